"""Noise levels that mean the same for every model family, and windows of noise levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW_TOLERANCE = 1e-3
"""Relative tolerance of a window's bounds: a schedule's value that equals a bound up to rounding is
inside."""


@dataclass(frozen=True)
class NoiseLevel:
    """Coefficients of the forward process x_t = signal * x0 + noise * eps with eps ~ N(0, I).

    Rectified-flow models such as SD3 and Flux have signal 1 - t and noise t, with t in [0, 1].
    """

    signal: float
    noise: float

    @classmethod
    def variance_exploding(cls, sigma: float) -> NoiseLevel:
        """Return the level of epsilon- and v-prediction models, x_t = x0 + sigma * eps as in k-diffusion."""
        return cls(1.0, sigma)

    @property
    def sigma(self) -> float:
        """Return the noise-to-signal ratio, k-diffusion's sigma; infinite when the signal is zero."""
        return self.noise / self.signal if self.signal > 0 else math.inf


@dataclass(frozen=True)
class SigmaWindow:
    """Noise levels low <= sigma <= high, as noise-to-signal ratios, at which a method acts."""

    high: float = math.inf
    low: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"The window runs from sigma {self.high:g} down to {self.low:g}. "
                "Make its start larger than its end."
            )

    def __contains__(self, level: NoiseLevel) -> bool:
        return self.low * (1 - WINDOW_TOLERANCE) <= level.sigma <= self.high * (1 + WINDOW_TOLERANCE)
