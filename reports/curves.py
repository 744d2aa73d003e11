"""Line plots as images, for nodes that show how a value changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH, HEIGHT, MARGIN = 512, 256, 12
PAPER, GRID, INK = 0.12, 0.22, (0.95, 0.75, 0.25)
LINES = 4


def curve(values: Sequence[float]) -> Tensor:
    """Plot `values` as a line, scaled from their minimum to their maximum: (HEIGHT, WIDTH, 3) in [0, 1]."""
    image = torch.full((HEIGHT, WIDTH, 3), PAPER)
    top, bottom = MARGIN, HEIGHT - 1 - MARGIN
    for line in range(LINES + 1):
        image[top + (bottom - top) * line // LINES] = GRID
    series = torch.tensor(list(values), dtype=torch.float64)
    if not len(series) or not bool(torch.isfinite(series).all()):
        return image
    low, span = series.min(), (series.max() - series.min()).clamp_min(1e-12)
    columns = torch.arange(MARGIN, WIDTH - MARGIN)
    place = (columns - MARGIN) / (WIDTH - 2 * MARGIN - 1) * (len(series) - 1)
    before = place.floor().long().clamp(max=len(series) - 1)
    after = (before + 1).clamp(max=len(series) - 1)
    value = series[before] + (series[after] - series[before]) * (place - before)
    rows = (bottom - (value - low) / span * (bottom - top)).round().long()
    previous = int(rows[0])
    for column, row in zip(columns.tolist(), rows.tolist()):
        first, last = min(previous, row), max(previous, row)
        image[first : last + 1, column] = torch.tensor(INK)
        previous = row
    return image
