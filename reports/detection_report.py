"""Detection maps of images as an image sheet and in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .overlays import overlay_map


def detection_sheet(images: Tensor, maps: Tensor) -> Tensor:
    """Draw a row for each image: the image, then its map at every noise level over the image.

    Args:
        images: (B, H, W, 3) in [0, 1].
        maps: (B, number of noise levels, H, W) in [0, 1].

    Returns:
        (B, H, W (1 + number of noise levels), 3) in [0, 1].
    """
    rows = [
        torch.cat([image, *(overlay_map(image, map_) for map_ in of_image)], dim=1)
        for image, of_image in zip(images, maps)
    ]
    return torch.stack(rows)


def detections_in_words(maps: Tensor, sigmas: Sequence[float], threshold: float) -> str:
    """Describe the highest detection at every noise level and where it was found, in a line per image.

    Args:
        maps: (B, number of noise levels, h, w) in [0, 1].
        sigmas: the noise levels.
        threshold: detection from which the concept counts as found.
    """
    lines = []
    for index, of_image in enumerate(maps):
        levels = [_level_in_words(map_, sigma, threshold) for map_, sigma in zip(of_image, sigmas)]
        lines.append(f"image {index + 1}: " + "; ".join(levels))
    return "\n".join(lines)


def _level_in_words(map_: Tensor, sigma: float, threshold: float) -> str:
    share = float((map_ >= threshold).float().mean())
    found = f"found on {share:.1%}" if share else "not found"
    return f"sigma {sigma:g}: {float(map_.max()):.2f}, {found}"
