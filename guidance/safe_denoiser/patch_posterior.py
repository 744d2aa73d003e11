"""Per-window posterior P(unwanted | window), estimated from masked reference images.

Images with masks on the unwanted subject hold samples of both parts of the theory's mixture: the masked
windows come from the unwanted part of the data, all other windows from the safe part. Kernel estimates p_u
and p_s of both parts (Eq. 6 of the Safe Denoiser paper, for windows instead of whole images) give the
posterior P(unwanted | window) = p_u / (p_s + p_u). It needs no threshold in units of similarity. Without p_s,
everything that is drawn sharply would resemble the unwanted subject.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.references import evenly_spread
from .edge_descriptors import DETAIL, cut_window, window_descriptors, window_weight

SIDE = 16
"""Windows are placed on a grid of about this many positions along the image's shorter side."""

LARGEST_WINDOW = 15
COMPONENTS = 48
"""Principal components that describe a window. 32 to 96 do equally well on the demo model."""

HARDEST, SPREAD = 4, 4
"""Neutral windows that are kept of every image: those most like the unwanted subject, and others spread over
all ranks."""

MOST_IMAGES = 512
OUTSIDE = 1 / 3
"""A window is outside the region when it holds less of it than this share of what the window around the
region holds."""

LEAST_TYPICAL = 1.0
"""Lower bound of a set's own log-odds. A subject that cannot be distinguished must not open the gate to every
image."""


@dataclass(frozen=True)
class PatchLibrary:
    """Windows of the reference images, as descriptors that predictions are compared with.

    Attributes:
        mean: (D,) of the descriptors.
        axes: (D, r), their principal components.
        unwanted: (N, r), components of the unwanted windows.
        neutral: (M, r), components of the neutral windows.
        bandwidth: scalar, twice the kernel's variance.
        typical: scalar, median log-odds of the unwanted windows, each compared with those of the other
            images.
        regions: (N, s, s) shape of the unwanted subject in its window, in [0, 1], at the latents' resolution.
        latents: (P, C, h, w) all images.
        outside: (P, h', w') bool, grid positions whose window is neutral.
        window: side of a window on the grid, odd.
        factor: latent pixels to a step of the grid.
    """

    mean: Tensor
    axes: Tensor
    unwanted: Tensor
    neutral: Tensor
    bandwidth: Tensor
    typical: Tensor
    regions: Tensor
    latents: Tensor
    outside: Tensor
    window: int
    factor: int

    def to(self, device: torch.device) -> PatchLibrary:
        """Return the same library on another device."""
        numbers = ("window", "factor")
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in numbers}
        return replace(self, **tensors)


def build_patch_library(latents: Tensor, regions: Tensor, temperature: float) -> PatchLibrary:
    """Describe the windows of masked images.

    Args:
        latents: (N, C, h, w) in the model's latent space, float32 or wider.
        regions: (N, 1, h, w) in [0, 1]. An image without a region is a neutral reference. An image that is
            unwanted as a whole says nothing about positions and is left out.
        temperature: width of the kernel, as a share of the windows' spread. With less the nearest windows
            decide.

    Raises:
        ValueError: the latents are too small for a grid of windows, or the masks leave no neutral window.
    """
    if min(latents.shape[-2:]) < DETAIL:
        raise ValueError(
            f"Latents of {latents.shape[-2]} x {latents.shape[-1]} pixels are too small to search for a "
            f"masked subject. Sample images of at least {DETAIL} latent pixels a side."
        )
    chosen = _some_of_both(regions)
    latents, regions = latents[chosen], regions[chosen].to(latents.dtype)
    factor = DETAIL * max(1, round(min(latents.shape[-2:]) / (DETAIL * SIDE)))
    grid = F.avg_pool2d(regions, factor)[:, 0]  # (P, h', w')
    has_region = (regions.flatten(1) > 0.5).any(1)
    window = min(LARGEST_WINDOW, max(_extent(region) for region in regions[has_region, 0]) // factor + 1) | 1

    descriptors = window_descriptors(latents, window, factor)  # (P, h' w', D)
    centres = torch.stack([_centre(region) for region in grid])
    outside = _outside(grid, centres, window, has_region)
    if not bool(outside.any()):
        raise ValueError(
            "The masks cover nearly all of every image at this size, so the negation set shows nothing "
            "neutral. Paint smaller masks, or add images with empty masks."
        )
    own = has_region.nonzero()[:, 0]
    unwanted = descriptors[own, centres[own, 0] * grid.shape[-1] + centres[own, 1]]  # (N, D)
    mean, axes = _principal(unwanted, descriptors, outside)

    components = (descriptors - mean) @ axes  # (P, h' w', r)
    unwanted = (unwanted - mean) @ axes  # (N, r)
    bandwidth = (temperature * unwanted.square().sum(1).mean()).clamp_min(1e-9)
    likelihood = log_density(components, unwanted, bandwidth).masked_fill(~outside.flatten(1), -math.inf)
    picked, of_image = _pick_neutral(likelihood)
    neutral = components.flatten(0, 1)[picked]  # (M, r)
    typical = _typical(unwanted, own, neutral, of_image, bandwidth)
    padded = [F.pad(regions[i], (window // 2 * factor,) * 4) for i in own]
    shapes = torch.stack([cut_window(p, centres[i], window, factor)[0] for p, i in zip(padded, own)])
    return PatchLibrary(
        mean, axes, unwanted, neutral, bandwidth, typical, shapes, latents, outside, window, factor
    )


def _some_of_both(regions: Tensor) -> Tensor:
    """Return the indices of the images to use, in order: at most MOST_IMAGES, with regions and without.

    Images that are unwanted as a whole are left out. Of a larger set, images of both kinds are evenly spread,
    so that a few masked images among many neutral ones are not missed.
    """
    inside = regions.flatten(1) > 0.5
    marked = (inside.any(1) & ~inside.all(1)).nonzero()[:, 0]
    neutral = (~inside.any(1)).nonzero()[:, 0]
    marked = marked[evenly_spread(len(marked), max(MOST_IMAGES // 2, MOST_IMAGES - len(neutral)))]
    neutral = neutral[evenly_spread(len(neutral), MOST_IMAGES - len(marked))]
    return torch.cat([marked, neutral]).sort().values


def log_density(components: Tensor, samples: Tensor, bandwidth: Tensor) -> Tensor:
    """Return the log of the mean kernel between (..., r) and (N, r), up to a constant: (...)."""
    logits = -_square_distance(components, samples) / bandwidth  # (..., N)
    return torch.logsumexp(logits, dim=-1) - math.log(len(samples))


def _square_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances, (..., r), (N, r) -> (..., N).

    Windows have at most unit length, so nothing cancels.
    """
    return (a.square().sum(-1, keepdim=True) - 2 * a @ b.T + b.square().sum(-1)).clamp_min(0)


def patch_log_odds(x: Tensor, library: PatchLibrary, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return log(p_u / p_s) on the grid, (B, h', w'), and the windows' components, (B, h' w', r).

    Args:
        x: (B, C, h, w) prediction.
        library: windows of both kinds.
        mask: (1 or B, 1, h, w), where to search; positions outside it have -inf.
    """
    components = (window_descriptors(x, library.window, library.factor) - library.mean) @ library.axes
    unwanted = log_density(components, library.unwanted, library.bandwidth)
    neutral = log_density(components, library.neutral, library.bandwidth)
    odds = unwanted - neutral  # (B, h' w')
    odds = odds.view(len(x), x.shape[-2] // library.factor, x.shape[-1] // library.factor)  # (B, h', w')
    if mask is not None:
        odds = odds.masked_fill(F.avg_pool2d(mask.to(x.dtype), library.factor)[:, 0] < 0.5, -math.inf)
    return odds, components


def _extent(region: Tensor) -> int:
    """Return the longer side of the bounding box of a region (h, w), in pixels."""
    inside = region > 0.5
    down, across = inside.any(1).nonzero(), inside.any(0).nonzero()
    return int(max(down.max() - down.min(), across.max() - across.min())) + 1


def _centre(region: Tensor) -> Tensor:
    """Return the grid position (2,) of the middle of a region's bounding box; (0, 0) without a region."""
    inside = region > 0.5 * region.max()
    found = [axis.nonzero() for axis in (inside.any(1), inside.any(0))]
    return torch.tensor([int(f.min() + f.max()) // 2 if len(f) else 0 for f in found], device=region.device)


def _outside(grid: Tensor, centres: Tensor, window: int, has_region: Tensor) -> Tensor:
    """Return the positions whose window holds little of the image's region, (P, h', w') bool."""
    weight = window_weight(window, grid)
    held = F.conv2d(grid[:, None], weight[None, None], padding=window // 2)[:, 0]  # (P, h', w')
    around = held[torch.arange(len(held)), centres[:, 0], centres[:, 1]][:, None, None]  # (P, 1, 1)
    return (held < OUTSIDE * around) | ~has_region[:, None, None]


def _principal(unwanted: Tensor, descriptors: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and principal axes (D, r) of unwanted and neutral windows, both with equal weight."""
    other = descriptors[outside.flatten(1)]
    mean = (unwanted.mean(0) + other.mean(0)) / 2
    a, b = unwanted - mean, other - mean
    covariance = (a.T @ a / len(a) + b.T @ b / len(b)).double()
    # Single precision does not converge on the many equal eigenvalues of few or flat images.
    axes = torch.linalg.eigh(covariance).eigenvectors[:, -COMPONENTS:]
    return mean, axes.to(mean.dtype)


def _pick_neutral(likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the neutral windows to keep.

    Args:
        likelihood: (P, h' w') log density of being unwanted, -inf for windows that are not neutral.

    Returns:
        Their indices among all windows of all images, (M,), and the image of each, (M,).
    """
    picked, images = [], []
    for image, of_image in enumerate(likelihood):
        ranked = of_image.argsort(descending=True)[: int((of_image > -math.inf).sum())]
        ranks = _ranks(len(ranked))
        picked.append(ranked[ranks] + image * likelihood.shape[1])
        images += [image] * len(ranks)
    return torch.cat(picked), torch.tensor(images, device=likelihood.device)


def _ranks(count: int) -> list[int]:
    """Return the ranks of the windows to keep of `count`: the first HARDEST, and SPREAD of the rest."""
    if count <= HARDEST:
        return list(range(count))
    return [*range(HARDEST), *torch.linspace(HARDEST, count - 1, SPREAD).long().tolist()]


def _typical(unwanted: Tensor, own: Tensor, neutral: Tensor, of_image: Tensor, bandwidth: Tensor) -> Tensor:
    """Return the median log-odds of the unwanted windows against those of all other images, a scalar.

    Fewer than three windows have no median; the result is then 2 LEAST_TYPICAL.
    """
    if len(unwanted) < 3:
        return unwanted.new_tensor(2 * LEAST_TYPICAL)
    to_unwanted = -_square_distance(unwanted, unwanted) / bandwidth  # (N, N)
    to_unwanted = to_unwanted.masked_fill(own[:, None] == own, -math.inf)
    to_neutral = -_square_distance(unwanted, neutral) / bandwidth  # (N, M)
    to_neutral = to_neutral.masked_fill(own[:, None] == of_image, -math.inf)
    unwanted_count = (to_unwanted > -math.inf).sum(1)
    neutral_count = (to_neutral > -math.inf).sum(1).clamp_min(1)
    odds = to_unwanted.logsumexp(1) - unwanted_count.log() - to_neutral.logsumexp(1) + neutral_count.log()
    return odds.median().clamp_min(LEAST_TYPICAL)
