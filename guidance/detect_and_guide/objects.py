"""Objects in a mask: their labels and sizes, and values that extend from them to the positions around."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_STD = 2.0
"""Standard deviation of the "blur" fill in latent pixels."""


def label_objects(mask: Tensor, connectivity: int = 8) -> Tensor:
    """Label the connected components of a mask.

    Args:
        mask: (B, h, w) bool.
        connectivity: 8 or 4 neighbours.

    Returns:
        (B, h, w) int64: 0 outside the mask, and a number for every object that no other object of the sample
        has.
    """
    height, width = mask.shape[-2:]
    # The largest index of an object spreads through it. float32 counts exactly up to 2^24 positions.
    indices = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float32)
    seeds = indices.view(1, height, width)
    inside = mask.float()
    labels = seeds * inside
    while True:
        spread = _largest_neighbour(labels, connectivity) * inside
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _largest_neighbour(labels: Tensor, connectivity: int) -> Tensor:
    """Return the largest value (B, h, w) among every position and its 8 or 4 neighbours."""
    if connectivity == 8:
        return F.max_pool2d(labels, 3, stride=1, padding=1)
    horizontal = F.max_pool2d(labels, (1, 3), stride=1, padding=(0, 1))
    vertical = F.max_pool2d(labels, (3, 1), stride=1, padding=(1, 0))
    return torch.maximum(horizontal, vertical)


def object_shares(mask: Tensor, connectivity: int = 8) -> Tensor:
    """Return the share of the image that the object at every position covers; 0 outside objects.

    Args:
        mask: (B, h, w) bool.
        connectivity: 8 or 4 neighbours.

    Returns:
        (B, h, w) float32.
    """
    labels = label_objects(mask, connectivity).flatten(1)  # (B, h w)
    positions = labels.shape[1]
    ones = torch.ones_like(labels, dtype=torch.float32)
    counts = torch.zeros(len(labels), positions + 1, device=mask.device).scatter_add_(1, labels, ones)
    return (counts.gather(1, labels) / positions).view(mask.shape) * mask


def fill_nearest(values: Tensor, known: Tensor) -> Tensor:
    """Give every position the value of the nearest known position.

    Of equally near ones, the first in reading order counts.

    Args:
        values: (B, h, w).
        known: (B, h, w) bool. A sample without any keeps its values.
    """
    return torch.stack([_fill_one(v, k) for v, k in zip(values, known)])


def _fill_one(values: Tensor, known: Tensor) -> Tensor:
    """Fill one sample (h, w)."""
    # The nearest known position of a position outside always lies on the border of the known ones.
    surrounded = -F.max_pool2d(-known[None].float(), 3, stride=1, padding=1)[0] > 0
    border = (known & ~surrounded).nonzero()  # (n, 2)
    outside = (~known).nonzero()  # (m, 2)
    if len(border) == 0 or len(outside) == 0:
        return values
    filled = values.clone()
    for part in outside.split(4096):
        offset = part[:, None] - border[None]  # (part, n, 2)
        nearest = border[(offset**2).sum(-1).argmin(1)]  # (part, 2)
        filled[part[:, 0], part[:, 1]] = values[nearest[:, 0], nearest[:, 1]]
    return filled


def fill_blurred(values: Tensor, known: Tensor) -> Tensor:
    """Return the Gaussian-weighted mean of the known values around every position; zero far from all of them.

    Args:
        values: (B, h, w).
        known: (B, h, w) bool.
    """
    radius = round(3 * BLUR_STD)
    offsets = torch.arange(-radius, radius + 1, device=values.device, dtype=values.dtype)
    kernel = torch.exp(-0.5 * (offsets / BLUR_STD) ** 2)

    def blurred(x: Tensor) -> Tensor:
        horizontally = F.conv2d(x[:, None], kernel.view(1, 1, 1, -1), padding=(0, radius))
        return F.conv2d(horizontally, kernel.view(1, 1, -1, 1), padding=(radius, 0))[:, 0]

    weights = blurred(known.to(values.dtype))
    mean = blurred(values * known) / weights.clamp_min(1e-6)
    return torch.where(weights > 1e-6, mean, torch.zeros_like(values))


def within_reach(mask: Tensor, reach: float) -> Tensor:
    """Dilate a mask (B, h, w) bool by `reach` times the longer side, in rows and in columns."""
    radius = max(1, round(reach * max(mask.shape[-2:])))
    return F.max_pool2d(mask.float(), 2 * radius + 1, stride=1, padding=radius) > 0
