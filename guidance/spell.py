"""Sparse Repellency (SPELL; Kirchhof et al., "Shielded Diffusion: Generating Novel and Diverse Images using Sparse Repellency", 2024).

Around every reference z_n lies a ball of radius r that predictions are kept out of. With u_n = x0 - z_n the change is

    delta = o sum_n relu(r - ||u_n||) u_n / ||u_n||

It is exactly zero when no reference is closer than r. With one reference inside and o = 1 the prediction lands on the
ball's surface; o > 1 overshoots. There is no weighting by proximity: overlapping balls add up, which a cap bounds.

Radii are given free of the latent's size, as rho = r / sqrt(D), a root mean square difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .core.composition import capped
from .core.noise_level import SigmaWindow
from .core.references import References

COINCIDENT = 1e-6
"""Closer than this a direction away does not exist; the prediction is then pushed along itself."""

CAP = 0.5
"""Largest change as a share of the prediction's norm, as for Safe Denoiser."""


PUBLISHED_RADIUS = 0.303
"""rho of the published Stable Diffusion 1.4 baseline (r = 38.746 at 16,384 numbers), for references of `unit_pixels`."""


@dataclass(frozen=True)
class SpellSettings:
    """Settings of Sparse Repellency.

    Args:
        radius: rho, the balls' radius as a root mean square difference. 0 is the identity.
        overcompensation: o; 1 goes to the surface, the published code's 1.6 goes beyond. 0 is the identity.
        window: noise levels at which the method acts; the paper acts at all of them.
        cap: largest change, as a share of the prediction's norm.
        among_batch: keep the samples of a batch apart from each other too (the paper's dynamic references within a batch).
    """

    radius: float = 0.6
    overcompensation: float = 1.6
    window: SigmaWindow = SigmaWindow()
    cap: float = CAP
    among_batch: bool = False


@dataclass(frozen=True)
class SpellResult:
    """Outcome for a batch.

    `delta` (B, C, h, w) is to be added to the samples that are `inside` (B,) at least one ball; `nearest` (B,) is the distance
    to the closest reference in the units of the radius, infinite when there is none.
    """

    delta: Tensor
    inside: Tensor
    nearest: Tensor


def unit_pixels(latents: Tensor) -> Tensor:
    """Every latent pixel as a unit vector over channels, as the published code prepares references: (N, C, h, w) -> (N, C, h, w)."""
    return latents / torch.linalg.vector_norm(latents, dim=1, keepdim=True).clamp_min(COINCIDENT)


class _Repulsion:
    """Collects what one sample is pushed by. With a mask, distances and changes are taken inside it."""

    def __init__(self, x: Tensor, mask: Tensor, radius: float) -> None:
        self.x, self.mask = x, mask
        self.unit = (mask.sum() * len(x)).clamp_min(COINCIDENT).sqrt()
        self.reach = radius * self.unit
        self.delta = torch.zeros_like(x)
        self.inside = torch.zeros((), dtype=torch.long, device=x.device)
        self.nearest = x.new_tensor(torch.inf)

    def add(self, others: Tensor, signs: Tensor | None = None) -> None:
        """Push away from others (n, C, h, w); `signs` (n,) of +1 or -1 say which way to leave one that coincides."""
        distance = (self.mask * (self.x - others).square()).flatten(1).sum(1).sqrt()
        self.nearest = torch.minimum(self.nearest, distance.min())
        close = distance < self.reach
        if not bool(close.any()):
            return
        self.inside += close.sum()
        away, length = self.x - others[close], distance[close]
        together = length < COINCIDENT
        if bool(together.any()):
            way = torch.ones_like(length) if signs is None else signs[close].to(length)
            away = torch.where(_each(together), _each(way) * self._own_direction(), away)
            length = torch.where(together, 1.0, length)
        push = (self.reach - torch.where(together, 0.0, length)) / length
        self.delta += self.mask * (_each(push) * away).sum(0)

    def _own_direction(self) -> Tensor:
        norm = (self.mask * self.x.square()).sum().sqrt()
        if norm > COINCIDENT:
            return self.x / norm
        first = torch.zeros_like(self.x)
        first.view(-1)[int(self.mask.expand_as(self.x).flatten().argmax())] = 1
        return first


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def repellency(
    x: Tensor, references: Sequence[References], settings: SpellSettings, mask: Tensor | None = None
) -> SpellResult:
    """The change of every prediction, of its own accord and before anything else changes it.

    Args:
        x: (B, C, h, w) denoised predictions, float32 or wider.
        references: any number of (N, C, h, w) in the same space: a set's, and those that earlier batches gave.
        settings: radius, overcompensation, cap, among_batch.
        mask: (1 or B, 1, h, w) in [0, 1], where to look and to act.
    """
    seen = torch.ones_like(x[:1, :1]) if mask is None else mask.to(x.dtype)
    samples = [_Repulsion(row, seen[b % len(seen)], settings.radius) for b, row in enumerate(x)]
    for of_origin in references:
        for _, z in of_origin.chunks(x.device):
            for sample in samples:
                sample.add(z.to(x.dtype))
    if settings.among_batch:
        places = torch.arange(len(x), device=x.device)
        for b, sample in enumerate(samples):
            if len(x) > 1:
                others = places != b
                # Opposite ways for the two of a pair, or coinciding samples would move together.
                sample.add(x[others], torch.where(places[others] > b, 1.0, -1.0))
    delta = settings.overcompensation * torch.stack([sample.delta for sample in samples])
    inside = torch.stack([sample.inside for sample in samples])
    nearest = torch.stack([sample.nearest / sample.unit for sample in samples])
    return SpellResult(capped(delta, x, settings.cap), inside, nearest)
