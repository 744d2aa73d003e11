"""Per-window posterior P(style | window) and style-free content, estimated from style and neutral images.

A style is a texture: small windows share its statistics at every position, whatever the image shows. Images
in the unwanted style and neutral images give one covariance of windows each. These covariances take the place
of the kernel estimates of the Safe Denoiser paper. The direction of a window that is drawn from such a class
has an angular central Gaussian density (Tyler, "Statistical analysis for the angular central Gaussian
distribution on the sphere", Biometrika 1987), so the log-odds

    log p_u / p_s = 1/2 log (y' S^-1 y / y' U^-1 y) + const

per dimension, with the covariances S of neutral windows and U of the style's, do not depend on contrast.
Where a window is the sum of content and style, the posterior mean of the content is linear,
S (S + share U)^-1 y. A few images hold thousands of windows, so four images are enough to define a style.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.gaussian import gaussian_window
from ..core.references import evenly_spread

WINDOW = 5
"""Side of a window in latent pixels: 40 pixels of an image for VAEs that reduce 8 to 1."""

SHARE = 0.1
"""Assumed share of the style's covariance in a window. A larger share removes more of the style, and blurs
outlines more."""

RIDGE = 0.01
"""White noise in both classes, as a share of the neutral windows' mean variance: a few images do not hold
every window."""

FAINT = 0.05
"""Windows with less contrast than this share of the style's strongest ones count as faint, whatever they
show."""

BEYOND = 0.995
"""Images of a style also hold windows without it. The style's own windows exceed this share of all neutral
windows."""

ROUNDS = 3
"""Times that the style's windows are chosen again, by the odds that the last choice gives. Two rounds nearly
suffice."""

LEAST_LEAD = 0.3
"""Smallest lead of a style's log-odds over neutral ones. A style that cannot be distinguished must not open
every gate."""

MOST_IMAGES, MOST_WINDOWS = 64, 4096
"""Images of a class, and windows of an image, that are used, evenly spread. A covariance needs no more."""


@dataclass(frozen=True)
class StyleLibrary:
    """Statistics of a style and of neutral images that predictions are compared with.

    Attributes:
        neutral_precision, style_precision: (D, D) inverse covariances of windows, D = C * WINDOW^2.
        content_filter: (D, D), maps windows to the posterior mean of their content.
        faint: scalar, contrast below which windows do not count.
        neutral_median, neutral_highest: scalars, over the neutral images, of their largest log-odds.
        typical: scalar, median over the style's images of their largest log-odds.
    """

    neutral_precision: Tensor
    style_precision: Tensor
    content_filter: Tensor
    faint: Tensor
    neutral_median: Tensor
    neutral_highest: Tensor
    typical: Tensor

    def to(self, device: torch.device) -> StyleLibrary:
        """Return the same library on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def build_style_library(latents: Tensor, regions: Tensor) -> StyleLibrary:
    """Estimate the style of the unwanted images against the neutral ones.

    Args:
        latents: (N, C, h, w) in the model's latent space, float32 or wider.
        regions: (N, 1, h, w) in [0, 1], full for images of the style and empty for neutral ones; other images
            are left out.
    """
    inside = regions.flatten(1) > 0.5
    styled = _some(latents[inside.all(1)])
    neutral = _some(latents[~inside.any(1)])
    neutral_covariance = _covariance(_windows_of(neutral))
    variance = neutral_covariance.diagonal().mean().clamp_min(1e-9)
    noise = (
        RIDGE * variance * torch.eye(len(neutral_covariance), dtype=variance.dtype, device=variance.device)
    )
    neutral_covariance = neutral_covariance + noise
    neutral_precision = torch.linalg.inv(neutral_covariance)
    faint = FAINT * _quantile(torch.cat([y.norm(dim=-1) for y in _windows_of(styled)]), 0.99)
    style_covariance = _style_covariance(styled, neutral, neutral_precision, noise, faint)
    unknown = neutral_precision.new_zeros(())
    library = StyleLibrary(
        neutral_precision,
        torch.linalg.inv(style_covariance),
        neutral_covariance @ torch.linalg.inv(neutral_covariance + SHARE * style_covariance),
        faint,
        neutral_median=unknown,
        neutral_highest=unknown,
        typical=unknown,
    )
    return _with_levels(library, styled, neutral)


def _style_covariance(
    styled: Tensor, neutral: Tensor, neutral_precision: Tensor, noise: Tensor, faint: Tensor
) -> Tensor:
    """Return the covariance (D, D) of the style's own windows, which are chosen again in every round."""

    def covariance_above(score: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the covariance of the styled windows that score higher than nearly all neutral ones."""
        of_neutral = torch.cat([score(y) for y in _windows_of(neutral)])
        of_styled = torch.cat([score(y) for y in _windows_of(styled)])
        limit = torch.minimum(_quantile(of_neutral, BEYOND), _quantile(of_styled, 0.99))
        return _covariance(y[score(y) >= limit] for y in _windows_of(styled)) + noise

    covariance = covariance_above(partial(_quadratic, inverse=neutral_precision))
    for _ in range(ROUNDS):
        precision = torch.linalg.inv(covariance)
        odds = partial(window_log_odds, neutral=neutral_precision, style=precision, faint=faint)
        covariance = covariance_above(odds)
    return covariance


def _with_levels(library: StyleLibrary, styled: Tensor, neutral: Tensor) -> StyleLibrary:
    """Return the library with the log-odds that neutral images and images of the style reach."""
    of_neutral = torch.stack([style_log_odds(z[None], library).amax() for z in neutral])
    of_style = torch.stack([style_log_odds(z[None], library).amax() for z in styled])
    highest = of_neutral.amax()
    typical = torch.maximum(of_style.median(), highest + LEAST_LEAD)
    return replace(library, neutral_median=of_neutral.median(), neutral_highest=highest, typical=typical)


def style_log_odds(x: Tensor, library: StyleLibrary) -> Tensor:
    """Return log(p_u / p_s) per dimension, averaged over neighbours: (B, C, h, w) -> (B, 1, h, w)."""
    y, _ = windows(x)
    odds = window_log_odds(y, library.neutral_precision, library.style_precision, library.faint)  # (B, h w)
    odds = odds.view(len(x), 1, *x.shape[-2:])  # (B, 1, h, w)
    return F.avg_pool2d(odds, 3, 1, 1, count_include_pad=False)


def without_style(x: Tensor, library: StyleLibrary) -> Tensor:
    """Return the posterior mean of the content, from all windows that hold a pixel: (B, C, h, w)."""
    y, mean = windows(x)
    weight = _weight(x)
    content = (y @ library.content_filter.T).view(
        *y.shape[:2], x.shape[1], -1
    ) + mean  # (B, h w, C, WINDOW^2)
    padded = (x.shape[-2] + WINDOW - 1, x.shape[-1] + WINDOW - 1)

    def overlapped(values: Tensor) -> Tensor:
        folded = F.fold((values * weight).flatten(2).transpose(1, 2), padded, WINDOW)
        return folded[..., WINDOW // 2 : -(WINDOW // 2), WINDOW // 2 : -(WINDOW // 2)]  # (B, C, h, w)

    return overlapped(content) / overlapped(torch.ones_like(content))


def windows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the window around every pixel less its mean per channel, and that mean.

    Args:
        x: (B, C, h, w) latents.

    Returns:
        (B, h w, D) and (B, h w, C, 1).
    """
    padded = F.pad(x, (WINDOW // 2,) * 4, mode="replicate")
    pixels = F.unfold(padded, WINDOW).transpose(1, 2)  # (B, h w, D)
    pixels = pixels.unflatten(2, (x.shape[1], WINDOW * WINDOW))  # (B, h w, C, WINDOW^2)
    mean = (pixels * _weight(x)).sum(3, keepdim=True)
    return (pixels - mean).flatten(2), mean


def window_log_odds(y: Tensor, neutral: Tensor, style: Tensor, faint: Tensor) -> Tensor:
    """Return the log-odds of windows, (..., D) -> (...), from both precisions; at most 0 for faint ones."""
    odds = 0.5 * (_quadratic(y, neutral).clamp_min(1e-12).log() - _quadratic(y, style).clamp_min(1e-12).log())
    return torch.where(y.norm(dim=-1) > faint, odds, odds.clamp(max=0))


def _weight(like: Tensor) -> Tensor:
    """Return a Gaussian window of unit sum, (WINDOW^2,)."""
    weight = gaussian_window(WINDOW, WINDOW / 3, like).flatten()
    return weight / weight.sum()


def _windows_of(latents: Tensor) -> Iterator[Tensor]:
    """Yield windows (n, D) of one image at a time: all windows of a set together take many times its size."""
    # An odd step reaches every column of an image.
    step = -(-latents[0, 0].numel() // MOST_WINDOWS) | 1
    return (windows(z[None])[0][0, ::step] for z in latents)


def _some(latents: Tensor) -> Tensor:
    return latents[evenly_spread(len(latents), MOST_IMAGES)]


def _covariance(chunks: Iterable[Tensor]) -> Tensor:
    """Return the covariance (D, D) of zero-mean windows, given as chunks (n, D)."""
    sums = [(y.T @ y, len(y)) for y in chunks]
    return torch.stack([square for square, _ in sums]).sum(0) / sum(count for _, count in sums)


def _quadratic(y: Tensor, inverse: Tensor) -> Tensor:
    return ((y @ inverse) * y).sum(-1)


def _quantile(values: Tensor, share: float) -> Tensor:
    return values.sort().values[min(len(values) - 1, int(share * len(values)))]
