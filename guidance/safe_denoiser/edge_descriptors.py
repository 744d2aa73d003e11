"""Descriptors of the windows of a latent: the orientation of their edges.

Early predictions already show edges, and their orientation does not depend on colours or on the VAE.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.gaussian import gaussian_window

DETAIL = 2
"""Edges are measured at this many times the resolution of the grid: early predictions hold no finer
detail."""

FAINT = 0.1
"""Windows with less contrast than this share of the image's strongest window count as faint, whatever they
show."""


def window_weight(window: int, like: Tensor) -> Tensor:
    """Return the Gaussian weight of a window's positions, (window, window)."""
    return gaussian_window(window, window / 2.6, like)


def window_descriptors(x: Tensor, window: int, factor: int) -> Tensor:
    """Return a descriptor of the window around every position of the grid: (B, C, h, w) -> (B, h' w', D).

    A descriptor holds the edges of all channels together, as strength and doubled angle (the structure
    tensor's three numbers), under a Gaussian weight and at equal length; faint windows stay short. It is
    independent of contrast, and of any rotation of the channels.

    Args:
        x: (B, C, h, w) latents.
        window: side of a window on the grid, odd.
        factor: latent pixels to a step of the grid, a multiple of DETAIL.
    """
    edges = F.avg_pool2d(_structure(F.avg_pool2d(x, factor // DETAIL)), DETAIL)  # (B, 3, h', w')
    padded = F.pad(edges, (window // 2,) * 4, mode="replicate")
    weight = window_weight(window, x).flatten().repeat(edges.shape[1])  # (D,), D = 3 window^2
    windows = F.unfold(padded, window).transpose(1, 2) * weight  # (B, h' w', D)
    length = windows.norm(dim=-1, keepdim=True)
    return windows / (length + FAINT * length.amax(1, keepdim=True)).clamp_min(1e-9)


def _structure(x: Tensor) -> Tensor:
    """Return strength, cosine and sine of the edges' doubled angle: (B, C, h, w) -> (B, 3, h, w)."""
    dx = F.pad(x[..., 2:] - x[..., :-2], (1, 1))
    dy = F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
    xx = dx.square().sum(1)
    yy = dy.square().sum(1)
    xy = (dx * dy).sum(1)
    strength = (xx + yy).clamp_min(1e-12).sqrt()
    return torch.stack([strength, (xx - yy) / strength, 2 * xy / strength], dim=1)


def cut_window(padded: Tensor, position: Tensor, window: int, factor: int) -> Tensor:
    """Return the window around a grid position, (C, window * factor, window * factor).

    Args:
        padded: (C, h, w) padded by half a window on every side.
        position: (2,) row and column on the grid.
        window: side of the window on the grid.
        factor: pixels of `padded` to a step of the grid.
    """
    top, left = int(position[0]) * factor, int(position[1]) * factor
    return padded[:, top : top + window * factor, left : left + window * factor]
