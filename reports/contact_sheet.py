"""A sheet of small images from a negation set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats.layouts import fit
from ..formats.negation_set import NegationSet
from ..formats.pixel_values import to_floats

CELL = 128
GAP = 4
BACKGROUND = 0.12


def contact_sheet(negation_set: NegationSet, most: int) -> Tensor:
    """Draw up to `most` images, evenly spread over the set, on a dark sheet: (H, W, 3) in [0, 1].

    The area outside an image's mask is dimmed.
    """
    count = min(most, len(negation_set))
    chosen = [round(i * (len(negation_set) - 1) / max(1, count - 1)) for i in range(count)]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    step = CELL + GAP
    sheet = torch.full((3, rows * step + GAP, columns * step + GAP), BACKGROUND)
    for position, index in enumerate(chosen):
        row, column = divmod(position, columns)
        top, left = GAP + row * step, GAP + column * step
        sheet[:, top : top + CELL, left : left + CELL] = _cell(negation_set, index)
    return sheet.movedim(0, -1)


def comparison_sheet(images: Tensor, negation_set: NegationSet, places: Tensor) -> Tensor:
    """Draw a row for each image: the image, then some images of the set.

    Args:
        images: (B, H, W, 3) in [0, 1].
        negation_set: the set to take the other images from.
        places: (B, k) indices of the set's images in each row.

    Returns:
        (H, W, 3) in [0, 1].
    """
    step = CELL + GAP
    rows, columns = len(images), places.shape[1] + 1
    sheet = torch.full((3, rows * step + GAP, columns * step + GAP), BACKGROUND)
    for row, image in enumerate(images):
        cells = [
            fit(image.movedim(-1, 0)[:3].float(), CELL, CELL),
            *(_cell(negation_set, int(place)) for place in places[row]),
        ]
        for column, cell in enumerate(cells):
            top, left = GAP + row * step, GAP + column * step
            sheet[:, top : top + CELL, left : left + CELL] = cell
    return sheet.movedim(0, -1)


def _cell(negation_set: NegationSet, index: int) -> Tensor:
    image = fit(to_floats(negation_set.images[index].movedim(-1, 0)), CELL, CELL)
    mask = negation_set.masks[index]
    if mask is None:
        return image
    shown = fit(to_floats(mask[None]), CELL, CELL)
    return image * (0.35 + 0.65 * shown)
