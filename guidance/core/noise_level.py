"""Noise levels that mean the same for every model family, and windows of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW_TOLERANCE = 1e-3
"""Relative slack of a window's bounds, so that a schedule's value that equals a bound up to rounding is inside."""


@dataclass(frozen=True)
class NoiseLevel:
    """Coefficients of the forward process x_t = signal * x0 + noise * eps with eps ~ N(0, I)."""

    signal: float
    noise: float

    @classmethod
    def variance_exploding(cls, sigma: float) -> NoiseLevel:
        """Epsilon- and v-prediction models in k-diffusion's coordinates: x_t = x0 + sigma * eps."""
        return cls(1.0, sigma)

    @classmethod
    def rectified_flow(cls, t: float) -> NoiseLevel:
        """SD3- and Flux-like models: x_t = (1 - t) * x0 + t * eps, t in [0, 1]."""
        return cls(1.0 - t, t)

    @property
    def sigma(self) -> float:
        """Noise-to-signal ratio, k-diffusion's sigma; infinite when nothing of x0 is left."""
        return self.noise / self.signal if self.signal > 0 else math.inf


@dataclass(frozen=True)
class SigmaWindow:
    """Noise levels low <= sigma <= high, in noise-to-signal units, at which a method acts."""

    high: float = math.inf
    low: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"The window runs from sigma {self.high:g} down to {self.low:g}. Make its start larger than its end."
            )

    def __contains__(self, level: NoiseLevel) -> bool:
        return self.low * (1 - WINDOW_TOLERANCE) <= level.sigma <= self.high * (1 + WINDOW_TOLERANCE)
