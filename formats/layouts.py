"""Negation-set images resized to the size of a run, with optional augmented copies (flips, crops, shifts)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .negation_set import NegationSet
from .pixel_values import to_floats

Fit = Literal["crop", "letterbox"]
Augmentation = Literal["none", "flip", "flip and crops", "flip, crops and shifts"]

CROP_SHARE = 0.8
"""Side of an augmenting crop as a share of the image's.

The crop moves the content by up to a tenth of the image and enlarges it by a quarter.
"""

SHIFT_SHARE = 1 / 8
"""Distance of an augmenting shift as a share of the image's side."""


@dataclass(frozen=True)
class Layout:
    """Options for resizing and augmenting images for a run.

    Attributes:
        fit: `crop` covers the size and crops the rest; `letterbox` keeps the whole image and fills the
            borders with its mean colour.
        augmentation: copies to add for each image. They help because images are compared pixel by pixel.
    """

    fit: Fit = "crop"
    augmentation: Augmentation = "none"

    @property
    def copies(self) -> int:
        """Return how many latents one image becomes."""
        return len(_VARIANTS[self.augmentation])


PLAIN = Layout()
"""Every image once, cropped to the size."""


def fit(image: Tensor, height: int, width: int) -> Tensor:
    """Scale (C, H, W) floats to cover height x width with the aspect kept, and crop the centre."""
    scale = max(height / image.shape[1], width / image.shape[2])
    size = (max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale)))
    resized = _resized(image, *size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, top : top + height, left : left + width]


def letterbox(image: Tensor, height: int, width: int, fill: Tensor) -> Tensor:
    """Scale (C, H, W) floats to fit into height x width, keep the aspect, and pad with `fill` (C,)."""
    scale = min(height / image.shape[1], width / image.shape[2])
    size = (
        min(height, max(1, round(image.shape[1] * scale))),
        min(width, max(1, round(image.shape[2] * scale))),
    )
    field = fill[:, None, None].expand(-1, height, width).clone()
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    field[:, top : top + size[0], left : left + size[1]] = _resized(image, *size)
    return field


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(
        image[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 1)


def pixels(
    negation_set: NegationSet, height: int, width: int, layout: Layout = PLAIN
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield every image (3, height, width) in [0, 1] with its mask (1, height, width) or None.

    Image and mask are resized and augmented in the same way. The copies of an image follow it directly.
    """
    for stored, stored_mask in zip(negation_set.images, negation_set.masks):
        image, mask = (
            to_floats(stored.movedim(-1, 0)),
            None if stored_mask is None else to_floats(stored_mask[None]),
        )
        if layout.fit == "crop":
            fitted, fitted_mask = (
                fit(image, height, width),
                None if mask is None else fit(mask, height, width),
            )
        else:
            fitted = letterbox(image, height, width, image.mean((1, 2)))
            fitted_mask = None if mask is None else letterbox(mask, height, width, torch.zeros(1))
        for vary in _VARIANTS[layout.augmentation]:
            yield vary(fitted), None if fitted_mask is None else vary(fitted_mask)


def _flip(image: Tensor) -> Tensor:
    return image.flip(-1)


def _crop(top: int, left: int) -> Callable[[Tensor], Tensor]:
    """Return a function that crops at a corner (0 or 1 per axis) and enlarges the crop to the whole size."""

    def apply(image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        rows, columns = max(1, round(CROP_SHARE * height)), max(1, round(CROP_SHARE * width))
        y, x = top * (height - rows), left * (width - columns)
        return _resized(image[:, y : y + rows, x : x + columns], height, width)

    return apply


def _shift(down: int, right: int) -> Callable[[Tensor], Tensor]:
    """Return a function that shifts by SHIFT_SHARE (-1, 0 or 1 times per axis) and repeats the border."""

    def apply(image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        y = (torch.arange(height) - down * round(SHIFT_SHARE * height)).clamp(0, height - 1)
        x = (torch.arange(width) - right * round(SHIFT_SHARE * width)).clamp(0, width - 1)
        return image[:, y][:, :, x]

    return apply


def _with_flips(variants: list[Callable[[Tensor], Tensor]]) -> list[Callable[[Tensor], Tensor]]:
    return [*variants, *((lambda image, vary=vary: _flip(vary(image))) for vary in variants)]


def _same(image: Tensor) -> Tensor:
    return image


_CROPS = [_crop(top, left) for top in (0, 1) for left in (0, 1)]
_SHIFTS = [_shift(-1, 0), _shift(1, 0), _shift(0, -1), _shift(0, 1)]
_VARIANTS: dict[Augmentation, list[Callable[[Tensor], Tensor]]] = {
    "none": [_same],
    "flip": [_same, _flip],
    "flip and crops": _with_flips([_same, *_CROPS]),
    "flip, crops and shifts": _with_flips([_same, *_CROPS, *_SHIFTS]),
}
