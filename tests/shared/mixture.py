"""Gaussian mixtures with known safe and unsafe parts: every posterior mean in closed form, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians N(mean_k, variance I) with weights; `unsafe` marks components."""

    means: Tensor
    variance: float
    weights: Tensor
    unsafe: Tensor

    def _log_terms(self, x: Tensor, sigma: float) -> Tensor:
        """Return log(weight_k N(x; mean_k, (variance + sigma^2) I)) up to a constant: (B, K)."""
        return self.weights.log() - torch.cdist(x, self.means).square() / (2 * (self.variance + sigma**2))

    def _mean(self, x: Tensor, sigma: float, include: Tensor) -> Tensor:
        logits = self._log_terms(x, sigma).masked_fill(~include, -torch.inf)
        per_component = (self.variance * x[:, None] + sigma**2 * self.means) / (self.variance + sigma**2)
        return (torch.softmax(logits, 1)[..., None] * per_component).sum(1)

    def data_mean(self, x: Tensor, sigma: float) -> Tensor:
        return self._mean(x, sigma, torch.ones_like(self.unsafe))

    def safe_mean(self, x: Tensor, sigma: float) -> Tensor:
        return self._mean(x, sigma, ~self.unsafe)

    def unsafe_mean(self, x: Tensor, sigma: float) -> Tensor:
        return self._mean(x, sigma, self.unsafe)

    def unsafe_odds(self, x: Tensor, sigma: float) -> Tensor:
        """Return beta*, the odds of the unsafe part given x: (B,)."""
        logits = self._log_terms(x, sigma)
        unsafe, safe = (
            torch.logsumexp(logits.masked_fill(~part, -torch.inf), 1) for part in (self.unsafe, ~self.unsafe)
        )
        return (unsafe - safe).exp()

    def log_density(self, x: Tensor, sigma: float) -> Tensor:
        total = self.variance + sigma**2
        return torch.logsumexp(self._log_terms(x, sigma), 1) - x.shape[1] / 2 * torch.log(
            torch.tensor(2 * torch.pi * total)
        )

    def unsafe_share(self, samples: Tensor) -> float:
        """Return the share of samples whose nearest component is unsafe."""
        return self.unsafe[torch.cdist(samples, self.means).argmin(1)].double().mean().item()


def ring() -> Mixture:
    """Make eight Gaussians on a circle of radius 4, two of them unsafe (the paper's Figure 3)."""
    angles = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    means = 4 * torch.stack([angles.cos(), angles.sin()], 1)
    return Mixture(means, 0.25**2, torch.full((8,), 1 / 8, dtype=torch.float64), torch.arange(8) < 2)


def karras(steps: int, high: float, low: float, rho: float = 7.0) -> Tensor:
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def sample(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Tensor, second_order: bool
) -> Tensor:
    """Sample by deterministic Euler or Heun steps (Karras et al.)."""
    for sigma, following in zip(sigmas.tolist(), sigmas.tolist()[1:]):
        slope = (x - denoise(x, sigma)) / sigma
        stepped = x + (following - sigma) * slope
        if second_order and following > 0:
            slope = (slope + (stepped - denoise(stepped, following)) / following) / 2
            stepped = x + (following - sigma) * slope
        x = stepped
    return x
