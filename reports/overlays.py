"""Overlays on images: a safety function's verdict and regions, and detection maps.

The colours are readable with every kind of colour vision and on every image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..formats.pixel_values import to_bytes
from ..guidance.safety_functions.interface import Region

UNSAFE, SAFE = (213, 94, 0), (0, 114, 178)
"""Okabe and Ito's vermilion and blue.

The frame of an image has either colour, the boxes of regions have UNSAFE.
"""
LABEL = (255, 255, 255)
SMALLEST_FONT = 10


def overlay_regions(image: Tensor, regions: Sequence[Region], is_unsafe: bool) -> Tensor:
    """Draw a frame in the verdict's colour, thicker if unsafe, and a box with a label for every region.

    Args:
        image: (H, W, 3) in [0, 1].
        regions: found in the image.
        is_unsafe: the verdict.

    Returns:
        (H, W, 3) in [0, 1].
    """
    canvas = Image.fromarray(to_bytes(image).cpu().numpy())
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    line = max(1, round(min(width, height) / 128))
    color, frame = (UNSAFE, 4 * line) if is_unsafe else (SAFE, 2 * line)
    draw.rectangle((0, 0, width - 1, height - 1), outline=color, width=frame)
    font = ImageFont.load_default(max(SMALLEST_FONT, min(width, height) // 24))
    for region in regions:
        left, right = region.box[0] * width, region.box[2] * width
        top, bottom = region.box[1] * height, region.box[3] * height
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=UNSAFE, width=line)
        _label(draw, (left, top), f"{region.label} {region.score:.2f}", font)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)


def _label(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Draw a text on a filled rectangle, because an image can have every colour."""
    left, top, right, bottom = draw.textbbox((corner[0] + 2, corner[1] + 1), text, font)
    draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=UNSAFE)
    draw.text((corner[0] + 2, corner[1] + 1), text, LABEL, font)


def overlay_map(image: Tensor, detection: Tensor) -> Tensor:
    """Draw a detection map in colour over the image in grey.

    Values from 1/2 on, which are detections, are bright red.

    Args:
        image: (H, W, 3) in [0, 1].
        detection: (H, W) in [0, 1].

    Returns:
        (H, W, 3) in [0, 1].
    """
    grey = image.mean(-1, keepdim=True).expand(-1, -1, 3) * 0.6
    faint = torch.tensor([0.15, 0.35, 1.0])
    detected = torch.tensor([1.0, 0.25, 0.1])
    value = detection[..., None]  # (H, W, 1)
    color = torch.where(value >= 0.5, detected, faint)
    weight = torch.where(value >= 0.5, 0.35 + 0.5 * value, 0.8 * value)
    return (grey * (1 - weight) + color * weight).clamp(0, 1)
