"""Which of two kinds a part of a prediction is: the unwanted thing, or what else stands in the same images.

Images whose masks say where the unwanted thing is hold both classes of the theory: the masked windows are samples of the
unwanted part of the data, all others of the safe part. With the kernel estimates p_u and p_s of both (Eq. 6 of the Safe
Denoiser paper, over windows instead of whole images) the posterior P(unwanted | window) = p_u / (p_s + p_u) needs no
threshold in units of similarity; without p_s whatever is drawn sharply resembles the unwanted thing. Windows are compared
by the orientation of their edges, which early predictions show already, and which does not depend on colours or the VAE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 16
"""Windows are looked for on a grid of about this many positions along the shorter side."""

DETAIL = 2
"""Edges are measured on latents reduced to DETAIL * SIDE pixels: early predictions hold no finer detail."""

LARGEST_WINDOW = 15
COMPONENTS = 48
"""Principal components that windows are described by. 32 to 96 do equally well on the demo model."""

HARDEST, SPREAD = 4, 4
"""Windows per image that stand for what is fine: those most like the unwanted thing, and others spread over all ranks."""

FAINT = 0.1
"""Windows with less contrast than this share of the image's strongest window count as faint, whatever they show."""

MOST_IMAGES = 512
OUTSIDE = 1 / 3
"""A window is outside the region when it holds less of it than this share of what the window around the region holds."""

LEAST_TYPICAL = 1.0
"""Log-odds that a set's own things reach at the least: one that cannot be told apart must not open the gate to everything."""


@dataclass(frozen=True)
class PatchLibrary:
    """Windows of the negation images, described and ready to be compared.

    Attributes:
        mean: (D,), axes: (D, r), the principal components of descriptions.
        unwanted: (N, r) and fine: (M, r), components of the windows of both kinds.
        bandwidth: scalar, twice the kernel's variance.
        typical: scalar, median log-odds of the unwanted windows, each compared with those of the other images.
        regions: (N, s, s) shape of the unwanted thing in its window, in [0, 1], at the latents' resolution.
        latents: (P, C, h, w) all images, outside: (P, h', w') bool, grid positions whose window is fine.
        window: side of a window on the grid, odd. factor: latent pixels to a step of the grid.
    """

    mean: Tensor
    axes: Tensor
    unwanted: Tensor
    fine: Tensor
    bandwidth: Tensor
    typical: Tensor
    regions: Tensor
    latents: Tensor
    outside: Tensor
    window: int
    factor: int

    def to(self, device: torch.device) -> PatchLibrary:
        """The same library on another device."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]


def has_places(regions: Tensor | None) -> bool:
    """Whether masks (N, 1, h, w) say where something is: some image has a part that is unwanted and one that is not."""
    if regions is None:
        return False
    inside = regions.flatten(1) > 0.5
    return bool((inside.any(1) & ~inside.all(1)).any())


def build_library(latents: Tensor, regions: Tensor, temperature: float) -> PatchLibrary:
    """Describe the windows of masked images.

    Args:
        latents: (N, C, h, w) in the model's latent space, float32 or wider.
        regions: (N, 1, h, w) in [0, 1]. An image without any region is an example of what is fine; one that is unwanted as
            a whole says nothing about a place and is left out.
        temperature: width of the kernel, as a share of the windows' spread. Less lets the nearest windows decide.
    """
    chosen = torch.linspace(0, len(latents) - 1, min(len(latents), MOST_IMAGES)).round().long()
    chosen = chosen[~(regions[chosen].flatten(1) > 0.5).all(1)]
    latents, regions = latents[chosen], regions[chosen].to(latents.dtype)
    factor = DETAIL * max(1, round(min(latents.shape[-2:]) / (DETAIL * SIDE)))
    grid = F.avg_pool2d(regions, factor)[:, 0]
    has_region = (regions.flatten(1) > 0.5).any(1)
    window = min(LARGEST_WINDOW, max(_extent(region) for region in regions[has_region, 0]) // factor + 1) | 1

    described = describe(latents, window, factor)
    centres = torch.stack([_centre(region) for region in grid])
    outside = _outside(grid, centres, window, has_region)
    own = has_region.nonzero()[:, 0]
    unwanted = described[own, centres[own, 0] * grid.shape[-1] + centres[own, 1]]
    mean, axes = _principal(unwanted, described, outside)

    components = (described - mean) @ axes
    unwanted = (unwanted - mean) @ axes
    bandwidth = (temperature * unwanted.square().sum(1).mean()).clamp_min(1e-9)
    likelihood = log_density(components, unwanted, bandwidth).masked_fill(~outside.flatten(1), -math.inf)
    picked, of_image = _pick(likelihood)
    fine = components.flatten(0, 1)[picked]
    shapes = torch.stack(
        [cut(F.pad(regions[i], (window // 2 * factor,) * 4), centres[i], window, factor)[0] for i in own]
    )
    typical = _typical(unwanted, own, fine, of_image, bandwidth)
    return PatchLibrary(
        mean, axes, unwanted, fine, bandwidth, typical, shapes, latents, outside, window, factor
    )


def describe(x: Tensor, window: int, factor: int) -> Tensor:
    """What every window of the grid shows, free of colour and contrast: (B, C, h, w) -> (B, h' w', D).

    The edges of all channels together, as strength and doubled angle (the structure tensor's three numbers), under a
    Gaussian window and at equal length; faint windows stay short. Free of any rotation of the channels as well.
    """
    edges = F.avg_pool2d(_structure(F.avg_pool2d(x, factor // DETAIL)), DETAIL)
    half = window // 2
    offset = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    weight = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * (window / 2.6) ** 2))
    windows = F.unfold(F.pad(edges, (half,) * 4, mode="replicate"), window).transpose(
        1, 2
    ) * weight.flatten().repeat(edges.shape[1])
    length = windows.norm(dim=-1, keepdim=True)
    return windows / (length + FAINT * length.amax(1, keepdim=True)).clamp_min(1e-9)


def _structure(x: Tensor) -> Tensor:
    dx, dy = F.pad(x[..., 2:] - x[..., :-2], (1, 1)), F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
    xx, yy, xy = dx.square().sum(1), dy.square().sum(1), (dx * dy).sum(1)
    strength = (xx + yy).clamp_min(1e-12).sqrt()
    return torch.stack([strength, (xx - yy) / strength, 2 * xy / strength], dim=1)


def log_density(components: Tensor, samples: Tensor, bandwidth: Tensor) -> Tensor:
    """Log of the mean kernel between (..., r) and (N, r), up to a constant: (...)."""
    return torch.logsumexp(-_square_distance(components, samples) / bandwidth, dim=-1) - math.log(
        len(samples)
    )


def _square_distance(a: Tensor, b: Tensor) -> Tensor:
    """(..., r), (N, r) -> (..., N). Windows have at most unit length, so nothing cancels."""
    return (a.square().sum(-1, keepdim=True) - 2 * a @ b.T + b.square().sum(-1)).clamp_min(0)


def log_odds(x: Tensor, library: PatchLibrary, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log of p_u / p_s at every position of the grid, and the windows' components: (B, h', w'), (B, h' w', r).

    Args:
        x: (B, C, h, w) prediction.
        mask: (1 or B, 1, h, w), where to look; positions that it leaves out have -inf.
    """
    components = (describe(x, library.window, library.factor) - library.mean) @ library.axes
    odds = log_density(components, library.unwanted, library.bandwidth) - log_density(
        components, library.fine, library.bandwidth
    )
    odds = odds.view(len(x), x.shape[-2] // library.factor, x.shape[-1] // library.factor)
    if mask is not None:
        odds = odds.masked_fill(F.avg_pool2d(mask.to(x.dtype), library.factor)[:, 0] < 0.5, -math.inf)
    return odds, components


def cut(padded: Tensor, position: Tensor, window: int, factor: int) -> Tensor:
    """The window around a grid position of (C, h, w) that was padded by half a window on every side."""
    top, left = (int(p) * factor for p in position)
    return padded[:, top : top + window * factor, left : left + window * factor]


def _extent(region: Tensor) -> int:
    inside = region > 0.5
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    return int(max(rows.max() - rows.min(), columns.max() - columns.min())) + 1


def _centre(region: Tensor) -> Tensor:
    """Grid position (2,) of the middle of a region's bounding box; of the image when there is no region."""
    inside = region > 0.5 * region.max()
    found = [axis.nonzero() for axis in (inside.any(1), inside.any(0))]
    return torch.tensor([int(f.min() + f.max()) // 2 if len(f) else 0 for f in found], device=region.device)


def _outside(grid: Tensor, centres: Tensor, window: int, has_region: Tensor) -> Tensor:
    """(P, h', w') bool, positions whose window holds little of the image's region."""
    offset = torch.arange(window, device=grid.device, dtype=grid.dtype) - window // 2
    weight = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * (window / 2.6) ** 2))
    held = F.conv2d(grid[:, None], weight[None, None], padding=window // 2)[:, 0]
    around = held[torch.arange(len(held)), centres[:, 0], centres[:, 1]][:, None, None]
    return (held < OUTSIDE * around) | ~has_region[:, None, None]


def _principal(unwanted: Tensor, described: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and principal axes of unwanted windows and windows outside, both kinds with equal weight."""
    other = described[outside.flatten(1)]
    mean = (unwanted.mean(0) + other.mean(0)) / 2
    a, b = unwanted - mean, other - mean
    covariance = (a.T @ a / len(a) + b.T @ b / len(b)).double()
    # Single precision does not converge on the many equal eigenvalues of few or flat images.
    axes = torch.linalg.eigh(covariance).eigenvectors[:, -COMPONENTS:]
    return mean, axes.to(mean.dtype)


def _pick(likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices of the fine windows to keep, and the image of each, from (P, h' w') with -inf for those not fine."""
    picked, images = [], []
    for image, row in enumerate(likelihood):
        ranked = row.argsort(descending=True)[: int((row > -math.inf).sum())]
        count = len(ranked)
        ranks = (
            [
                *range(min(HARDEST, count)),
                *torch.linspace(min(HARDEST, count), count - 1, SPREAD).long().tolist(),
            ]
            if count
            else []
        )
        picked.append(ranked[ranks] + image * likelihood.shape[1])
        images += [image] * len(ranks)
    return torch.cat(picked), torch.tensor(images, device=likelihood.device)


def _typical(unwanted: Tensor, own: Tensor, fine: Tensor, of_image: Tensor, bandwidth: Tensor) -> Tensor:
    """Median log-odds of the unwanted windows against those of all other images; with fewer than three there is no median."""
    if len(unwanted) < 3:
        return unwanted.new_tensor(2 * LEAST_TYPICAL)
    to_unwanted = (-_square_distance(unwanted, unwanted) / bandwidth).masked_fill(
        own[:, None] == own, -math.inf
    )
    to_fine = (-_square_distance(unwanted, fine) / bandwidth).masked_fill(own[:, None] == of_image, -math.inf)
    counts = (to_unwanted > -math.inf).sum(1), (to_fine > -math.inf).sum(1).clamp_min(1)
    odds = to_unwanted.logsumexp(1) - counts[0].log() - to_fine.logsumexp(1) + counts[1].log()
    return odds.median().clamp_min(LEAST_TYPICAL)
