"""Sparse Repellency (SPELL).

Kirchhof et al., "Shielded Diffusion: Generating Novel and Diverse Images using Sparse Repellency", 2024.

Predictions are kept out of a ball of radius r around every reference z_n. With u_n = x0 - z_n the change is

    delta = o sum_n relu(r - ||u_n||) u_n / ||u_n||

It is exactly zero when no reference is closer than r. With one reference inside and o = 1 the prediction
lands on the ball's surface; o > 1 overshoots. References are not weighted by their distance: overlapping
balls add up, which a cap bounds.

Radii are independent of the latent's size, as rho = r / sqrt(D), a root mean square difference. The published
Stable Diffusion 1.4 baseline has rho = 0.303 (r = 38.746 at 16,384 numbers), for references of
`with_unit_pixels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .core.composition import capped, per_sample
from .core.noise_level import SigmaWindow
from .core.references import References, unit_pixels

COINCIDENT = 1e-6
"""Distance below which no direction away from a reference exists; the prediction is then pushed along
itself."""

CAP = 0.5
"""Largest change as a share of the prediction's norm, as for Safe Denoiser."""


@dataclass(frozen=True)
class SpellSettings:
    """Settings of Sparse Repellency.

    Args:
        radius: rho, the balls' radius as a root mean square difference. 0 is the identity.
        overcompensation: o; 1 moves to the surface, the published code's 1.6 moves beyond. 0 is the identity.
        window: noise levels at which the method acts; the paper acts at all of them.
        cap: largest change, as a share of the prediction's norm.
        among_batch: also keep the samples of a batch apart from each other (the paper's dynamic references
            within a batch).
    """

    radius: float = 0.6
    overcompensation: float = 1.6
    window: SigmaWindow = SigmaWindow()
    cap: float = CAP
    among_batch: bool = False


@dataclass(frozen=True)
class SpellResult:
    """Outcome for a batch.

    Attributes:
        delta: (B, C, h, w), to be added to the samples that are inside at least one ball.
        inside: (B,) long, number of balls that each sample is inside of.
        nearest: (B,) distance to the closest reference in the units of the radius, infinite without
            references.
    """

    delta: Tensor
    inside: Tensor
    nearest: Tensor


def with_unit_pixels(references: References) -> References:
    """Return references whose pixels are unit vectors over the channels, as in the published code."""
    return references.then(partial(unit_pixels, least=COINCIDENT))


class _Repulsion:
    """The sum of the pushes on one sample (C, h, w).

    With a mask, distances and changes are taken inside it.
    """

    def __init__(self, x: Tensor, mask: Tensor, radius: float) -> None:
        self.x, self.mask = x, mask
        self.unit = (mask.sum() * len(x)).clamp_min(COINCIDENT).sqrt()
        self.reach = radius * self.unit
        self.delta = torch.zeros_like(x)
        self.inside = torch.zeros((), dtype=torch.long, device=x.device)
        self.nearest = x.new_tensor(torch.inf)

    def add(self, others: Tensor, signs: Tensor | None = None) -> None:
        """Add the pushes away from others.

        Args:
            others: (n, C, h, w).
            signs: (n,) of +1 or -1, the direction to move in when a reference coincides with the sample; None
                for +1.
        """
        distance = (self.mask * (self.x - others).square()).flatten(1).sum(1).sqrt()  # (n,)
        self.nearest = torch.minimum(self.nearest, distance.min())
        close = distance < self.reach
        if not bool(close.any()):
            return
        self.inside += close.sum()
        away, length = self.x - others[close], distance[close]
        together = length < COINCIDENT
        if bool(together.any()):
            way = torch.ones_like(length) if signs is None else signs[close].to(length)
            own = per_sample(way, away) * self._own_direction()
            away = torch.where(per_sample(together, away), own, away)
            length = torch.where(together, 1.0, length)
        push = (self.reach - torch.where(together, 0.0, length)) / length
        self.delta += self.mask * (per_sample(push, away) * away).sum(0)

    def _own_direction(self) -> Tensor:
        """Return the sample as a unit vector; for a sample that is zero, the first axis inside the mask."""
        norm = (self.mask * self.x.square()).sum().sqrt()
        if norm > COINCIDENT:
            return self.x / norm
        first = torch.zeros_like(self.x)
        first.view(-1)[int(self.mask.expand_as(self.x).flatten().argmax())] = 1
        return first


def repellency(
    x: Tensor, references: Sequence[References], settings: SpellSettings, mask: Tensor | None = None
) -> SpellResult:
    """Return the change of every prediction, from the uncorrected predictions of all samples.

    Args:
        x: (B, C, h, w) denoised predictions, float32 or wider.
        references: any number of (N, C, h, w) in the same space: those of a set, and those of earlier
            batches.
        settings: radius, overcompensation, cap, among_batch.
        mask: (1 or B, 1, h, w) in [0, 1], where to compare and to act.
    """
    seen = torch.ones_like(x[:1, :1]) if mask is None else mask.to(x.dtype)
    samples = [_Repulsion(sample, seen[b % len(seen)], settings.radius) for b, sample in enumerate(x)]
    for of_origin in references:
        for _, z in of_origin.chunks(x.device):
            for sample in samples:
                sample.add(z.to(x.dtype))
    if settings.among_batch and len(x) > 1:
        _repel_each_other(samples, x)
    delta = settings.overcompensation * torch.stack([sample.delta for sample in samples])
    inside = torch.stack([sample.inside for sample in samples])
    nearest = torch.stack([sample.nearest / sample.unit for sample in samples])
    return SpellResult(capped(delta, x, settings.cap), inside, nearest)


def _repel_each_other(samples: Sequence[_Repulsion], x: Tensor) -> None:
    """Push the samples of a batch x (B, C, h, w) away from each other."""
    positions = torch.arange(len(x), device=x.device)
    for b, sample in enumerate(samples):
        others = positions != b
        # Opposite directions for the two of a pair, or coinciding samples would move together.
        sample.add(x[others], torch.where(positions[others] > b, 1.0, -1.0))
