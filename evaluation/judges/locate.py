"""Location of a shape of the demo world in a sampled image.

The world's renderer draws the shape in several sizes and rotations. The drawings are correlated with the
image's pixels of the stated colour, and the best drawing and place are taken. tests/unit/test_locate.py
checks this on rendered scenes, whose masks are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...demo import world as world
from ..prompt_sets.prompts import Record

RADII = (0.32, 0.35, 0.38, 0.41, 0.45, 0.5)
TURNS = (-0.15, -0.05, 0.05, 0.15)
TEXTURED = ("dotted", "hatched")
DARKEST_INK, FLAT_INK = 0.25, 0.85
"""Darkest shade of a colour, as a factor: textures go down to a quarter, a flat colour only blurs."""
SHADES = (0.7, 1.3)
"""Range of shades of a background's pattern, as factors."""
MARGIN = 4
"""Pixels around a shape that count as part of it: one latent position."""


@dataclass(frozen=True)
class Located:
    """A shape found in an image.

    Attributes:
        mask: (SIZE, SIZE) bool, true on the drawing.
        center: row and column of its centre, in pixels.
    """

    mask: Tensor
    center: tuple[int, int]

    @property
    def surroundings(self) -> Tensor:
        """Return a mask (SIZE, SIZE), true outside the shape and a margin around it."""
        return F.max_pool2d(self.mask[None].float(), 2 * MARGIN + 1, 1, MARGIN)[0] == 0


def locate(image: Tensor, record: Record, shape: str) -> Located | None:
    """Find a shape that a prompt names.

    Args:
        image: (3, SIZE, SIZE) in [0, 1].
        record: the prompt.
        shape: name of the shape to find.

    Returns:
        The shape, or None when the prompt does not state it and its colour.
    """
    if shape not in record.shapes:
        return None
    color = record.colors[record.shapes.index(shape)]
    style = record.style or "flat"
    ink = _ink(image, color, [c for c in record.colors if c != color], record.background, style)
    drawings, kernels = _drawings(shape, style)
    framed = F.pad(2.0 * ink - 1, (0, world.SIZE, 0, world.SIZE))
    agreement = torch.fft.irfft2(torch.fft.rfft2(framed) * kernels, s=framed.shape)[
        :, : world.SIZE, : world.SIZE
    ]
    best = int(agreement.argmax())
    which, row, column = best // world.SIZE**2, best // world.SIZE % world.SIZE, best % world.SIZE
    moved = drawings[which].roll((row, column), (0, 1))[: world.SIZE, : world.SIZE]
    return Located(moved, (row, column))


def _ink(image: Tensor, color: str, others: list[str], background: str | None, style: str) -> Tensor:
    """Mark pixels nearer to a shade of the colour than to any other colour with 1: (SIZE, SIZE) float."""
    shades = (DARKEST_INK if style in TEXTURED else FLAT_INK, 1.0)
    own = _distance(image, world.COLORS[color], shades)
    rest = [_distance(image, world.COLORS[other], shades) for other in others]
    rest += [
        _distance(image, world.BACKGROUNDS[name], SHADES)
        for name in ([background] if background else world.BACKGROUNDS)
    ]
    return (own < torch.stack(rest).amin(0)).float()


def _distance(image: Tensor, color: tuple[float, float, float], shades: tuple[float, float]) -> Tensor:
    """Return the squared distance of every pixel to the nearest shade of a colour: (SIZE, SIZE)."""
    full = torch.tensor(color)[:, None, None]
    nearest = ((image * full).sum(0) / full.square().sum()).clamp(*shades)
    return (image - nearest * full).square().sum(0)


@lru_cache
def _drawings(shape: str, style: str) -> tuple[Tensor, Tensor]:
    """Draw a shape's filled masks, and return them with the spectra of the strokes that the style draws.

    All are centred at the origin of a frame of twice the size."""
    filled, strokes = [], []
    for radius in RADII:
        for turn in TURNS:
            scene = world.Scene(
                [world.Shape(shape, "white", 0.0, 0.0, radius, turn)], "black", "plain", "flat"
            )
            mask = world.render(scene)[1][0]
            filled.append(_at_origin(mask) > 0)
            strokes.append(_at_origin(mask * _outline(scene.shapes[0]) if style == "outline" else mask))
    return torch.stack(filled), torch.fft.rfft2(torch.stack(strokes)).conj()


def _outline(shape: world.Shape) -> Tensor:
    return (world.signed_distance(shape) > -2 * world.STROKE).float()


def _at_origin(mask: Tensor) -> Tensor:
    half = world.SIZE // 2
    return F.pad(mask, (0, world.SIZE, 0, world.SIZE)).roll((-half, -half), (0, 1))
