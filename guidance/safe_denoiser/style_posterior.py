"""How likely a part of a prediction is drawn in an unwanted style, and what it would be without that style.

A style is a texture: small windows share their statistics wherever they stand, whatever they show. Images of the unwanted
style and images that are fine give a covariance of windows each, and these take the place of the kernel estimates of the Safe
Denoiser paper. The direction of a window that is drawn from such a class has an angular central Gaussian density (Tyler,
"Statistical analysis for the angular central Gaussian distribution on the sphere", Biometrika 1987), so the log-odds

    log p_u / p_s = 1/2 log (y' S^-1 y / y' U^-1 y) + const       (per dimension; S of fine windows, U of the style's)

do not depend on contrast; and where a window is the sum of content and style, the posterior mean of the content is linear,
S (S + share U)^-1 y. A handful of images holds thousands of windows, which is why four of a style are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 5
"""Side of a window in latent pixels: 40 pixels of an image at the usual 8 to 1."""

SHARE = 0.1
"""How much of the style's covariance a window is taken to hold. More takes out more of it, and blurs more of the outlines."""

RIDGE = 0.01
"""White noise in both classes, as a share of the mean variance of fine windows: windows of a few images are not all there are."""

FAINT = 0.05
"""Windows with less contrast than this share of the style's strongest ones count as faint, whatever they show."""

BEYOND = 0.995
"""Images of a style also hold windows without it. Those of the style exceed this share of all fine windows."""

ROUNDS = 3
"""Times that the style's windows are chosen anew, by the odds that the last choice gives. It hardly changes after the second."""

LEAST_LEAD = 0.3
"""How far a style stands above what is fine at the least: one that cannot be told apart must not open the gate to everything."""

MOST_IMAGES, MOST_WINDOWS = 64, 4096
"""Images of a kind, and windows of an image, that describe it; spread evenly. A covariance needs no more."""


@dataclass(frozen=True)
class StyleLibrary:
    """What is known of a style, ready to be compared.

    Attributes:
        safe, style: (D, D) inverse covariance of fine windows and of the style's, D = C * WINDOW^2.
        content: (D, D) takes windows to the posterior mean of their content.
        faint: scalar, contrast below which windows do not count.
        usual, highest: scalars, the largest log-odds of a fine image: of half of them, and of all.
        typical: scalar, median over the style's images of their largest log-odds.
    """

    safe: Tensor
    style: Tensor
    content: Tensor
    faint: Tensor
    usual: Tensor
    highest: Tensor
    typical: Tensor

    def to(self, device: torch.device) -> StyleLibrary:
        """The same library on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def has_style(regions: Tensor | None) -> bool:
    """Whether masks (N, 1, h, w) name both images that are unwanted as a whole and images that are fine as a whole."""
    if regions is None:
        return False
    inside = regions.flatten(1) > 0.5
    return bool(inside.all(1).any()) and not bool(inside.any(1).all())


def build_style_library(latents: Tensor, regions: Tensor) -> StyleLibrary:
    """Describe the style of the unwanted images against those that are fine.

    Args:
        latents: (N, C, h, w) in the model's latent space, float32 or wider.
        regions: (N, 1, h, w) in [0, 1], full for images of the style and empty for fine ones; others are left out.
    """
    inside = regions.flatten(1) > 0.5
    styled, fine = _some(latents[inside.all(1)]), _some(latents[~inside.any(1)])
    safe = _covariance(_windows_of(fine))
    noise = (
        RIDGE
        * safe.diagonal().mean().clamp_min(1e-9)
        * torch.eye(len(safe), dtype=safe.dtype, device=safe.device)
    )
    safe = safe + noise
    inverse = torch.linalg.inv(safe)
    faint = FAINT * _quantile(torch.cat([y.norm(dim=-1) for y in _windows_of(styled)]), 0.99)

    def describe(score: Callable[[Tensor], Tensor]) -> Tensor:
        """The covariance of the style's windows: those with a higher score than nearly all fine ones."""
        of_fine, of_styled = (torch.cat([score(y) for y in _windows_of(group)]) for group in (fine, styled))
        limit = torch.minimum(_quantile(of_fine, BEYOND), _quantile(of_styled, 0.99))
        return _covariance(y[score(y) >= limit] for y in _windows_of(styled)) + noise

    style = describe(partial(_quadratic, inverse=inverse))
    for _ in range(ROUNDS):
        style = describe(partial(_odds, safe=inverse, style=torch.linalg.inv(style), faint=faint))

    unknown = inverse.new_zeros(())
    library = StyleLibrary(
        inverse,
        torch.linalg.inv(style),
        safe @ torch.linalg.inv(safe + SHARE * style),
        faint,
        *(unknown,) * 3,
    )
    of_fine, of_style = (
        torch.stack([log_odds(z[None], library).amax() for z in group]) for group in (fine, styled)
    )
    typical = torch.maximum(of_style.median(), of_fine.amax() + LEAST_LEAD)
    return replace(library, usual=of_fine.median(), highest=of_fine.amax(), typical=typical)


def log_odds(x: Tensor, library: StyleLibrary) -> Tensor:
    """Log of p_u / p_s per dimension, at every position and averaged over its neighbours: (B, C, h, w) -> (B, 1, h, w)."""
    odds = _odds(windows(x)[0], library.safe, library.style, library.faint)
    return F.avg_pool2d(odds.view(len(x), 1, *x.shape[-2:]), 3, 1, 1, count_include_pad=False)


def without_style(x: Tensor, library: StyleLibrary) -> Tensor:
    """The posterior mean of the content, from all windows that hold a pixel: (B, C, h, w) -> the same."""
    y, mean = windows(x)
    weight = _weight(x)
    content = (y @ library.content.T).view(*y.shape[:2], x.shape[1], -1) + mean
    padded = (x.shape[-2] + WINDOW - 1, x.shape[-1] + WINDOW - 1)

    def overlapped(values: Tensor) -> Tensor:
        folded = F.fold((values * weight).flatten(2).transpose(1, 2), padded, WINDOW)
        return folded[..., WINDOW // 2 : -(WINDOW // 2), WINDOW // 2 : -(WINDOW // 2)]

    return overlapped(content) / overlapped(torch.ones_like(content))


def windows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The window around every pixel less its mean per channel, and that mean: (B, C, h, w) -> (B, h w, D), (B, h w, C, 1)."""
    padded = F.pad(x, (WINDOW // 2,) * 4, mode="replicate")
    pixels = F.unfold(padded, WINDOW).transpose(1, 2).unflatten(2, (x.shape[1], WINDOW * WINDOW))
    mean = (pixels * _weight(x)).sum(3, keepdim=True)
    return (pixels - mean).flatten(2), mean


def _weight(like: Tensor) -> Tensor:
    """A Gaussian window of unit sum, (WINDOW^2,)."""
    offset = torch.arange(WINDOW, device=like.device, dtype=like.dtype) - WINDOW // 2
    weight = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * (WINDOW / 3) ** 2)).flatten()
    return weight / weight.sum()


def _windows_of(latents: Tensor) -> Iterator[Tensor]:
    # One image at a time: all windows of a set together are many times its size. An odd step meets every column of an image.
    step = -(-latents[0, 0].numel() // MOST_WINDOWS) | 1
    return (windows(z[None])[0][0, ::step] for z in latents)


def _some(latents: Tensor) -> Tensor:
    return latents[torch.linspace(0, len(latents) - 1, min(len(latents), MOST_IMAGES)).round().long()]


def _covariance(parts: Iterable[Tensor]) -> Tensor:
    sums = [(y.T @ y, len(y)) for y in parts]
    return torch.stack([square for square, _ in sums]).sum(0) / sum(count for _, count in sums)


def _quadratic(y: Tensor, inverse: Tensor) -> Tensor:
    return ((y @ inverse) * y).sum(-1)


def _odds(y: Tensor, safe: Tensor, style: Tensor, faint: Tensor) -> Tensor:
    odds = 0.5 * (_quadratic(y, safe).clamp_min(1e-12).log() - _quadratic(y, style).clamp_min(1e-12).log())
    return torch.where(y.norm(dim=-1) > faint, odds, odds.clamp(max=0))


def _quantile(values: Tensor, share: float) -> Tensor:
    return values.sort().values[min(len(values) - 1, int(share * len(values)))]
