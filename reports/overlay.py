"""Frames around a judged image and around what a safety function found in it, readable for every eye on every image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..guidance.safety_functions.interface import Region

UNSAFE, SAFE = (213, 94, 0), (0, 114, 178)
"""Okabe and Ito's vermilion and blue: colours of the outer frame, and UNSAFE of the regions'."""
LABEL = (255, 255, 255)
SMALLEST_FONT = 10


def overlay(pixels: Tensor, regions: Sequence[Region], unsafe: bool) -> Tensor:
    """An image (H, W, 3) in [0, 1] with a frame in the verdict's colour, thicker if unsafe, and a box and a label for every region."""
    image = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().cpu().numpy())
    draw = ImageDraw.Draw(image)
    width, height = image.size
    line = max(1, round(min(width, height) / 128))
    draw.rectangle(
        (0, 0, width - 1, height - 1), outline=UNSAFE if unsafe else SAFE, width=(4 if unsafe else 2) * line
    )
    font = ImageFont.load_default(max(SMALLEST_FONT, min(width, height) // 24))
    for region in regions:
        left, top, right, bottom = (
            share * side for share, side in zip(region.box, (width, height, width, height))
        )
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=UNSAFE, width=line)
        _label(draw, (left, top), f"{region.label} {region.score:.2f}", font)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def _label(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """A text on its own ground, because an image can have every colour."""
    left, top, right, bottom = draw.textbbox((corner[0] + 2, corner[1] + 1), text, font)
    draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=UNSAFE)
    draw.text((corner[0] + 2, corner[1] + 1), text, LABEL, font)
