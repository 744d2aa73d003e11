"""Frames around what a safety function found in a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .safety_function import Region

UNSAFE, SAFE = (214, 39, 40), (44, 160, 44)
"""Colours of the outer frame, and UNSAFE of the regions'."""


def overlay(picture: Tensor, regions: Sequence[Region], unsafe: bool) -> Tensor:
    """A picture (H, W, 3) in [0, 1] with a frame in the verdict's colour, and a box and a label for every region."""
    image = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())
    draw = ImageDraw.Draw(image)
    width, height = image.size
    line = max(1, round(min(width, height) / 128))
    draw.rectangle((0, 0, width - 1, height - 1), outline=UNSAFE if unsafe else SAFE, width=2 * line)
    for region in regions:
        left, top, right, bottom = (share * side for share, side in zip(region.box, (width, height, width, height)))
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=UNSAFE, width=line)
        draw.text((left + line + 1, top + line), f"{region.label} {region.score:.2f}", fill=UNSAFE)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
