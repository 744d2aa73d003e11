"""The Gaussian weight of a square window of pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_window(side: int, std: float, like: Tensor) -> Tensor:
    """Return a Gaussian around the middle of a window, 1 in the middle: (side, side).

    Args:
        side: pixels to a side, odd.
        std: standard deviation in pixels.
        like: gives device and dtype.
    """
    offset = torch.arange(side, device=like.device, dtype=like.dtype) - side // 2
    return torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * std**2))
