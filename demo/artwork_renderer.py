"""Renderer of the artwork world: draws scenes from the artists' images, with exact masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .artwork_subjects import COLORS
from .artwork_world import SIZE, Ground, Placed, Scene

SUPERSAMPLING = 2
"""Samples per pixel and axis: edges are averaged from these."""
MASK_THRESHOLD = 0.5
"""Visible share of a pixel from which on it belongs to a subject's mask."""
GRADIENT = 0.22
"""Difference in brightness between the ends of a graded ground and its middle."""


@dataclass(frozen=True)
class Artwork:
    """The artists' images, ready for rendering.

    Attributes:
        sprites: by style and subject: (4, S, S) in [0, 1], red, green, blue (multiplied by alpha) and alpha.
            The subject fills the square: its longer side is S.
        photographs: by name: (3, H, W) in [0, 1].
    """

    sprites: Mapping[tuple[str, str], Tensor]
    photographs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rendered:
    """An image of a scene.

    Attributes:
        image: (3, size, size) in [0, 1].
        coverage: (N, size, size) in [0, 1], the visible share of each pixel that each subject covers, in the
            order of `scene.placed`.
    """

    image: Tensor
    coverage: Tensor

    @property
    def masks(self) -> Tensor:
        """Return a boolean mask (N, size, size) of every subject. Masks do not overlap."""
        return self.coverage > MASK_THRESHOLD


def render(scene: Scene, artwork: Artwork, size: int = SIZE) -> Rendered:
    """Draw a scene at `size` x `size` pixels."""
    image = draw_ground(scene.ground, artwork.photographs, size)
    coverage: list[Tensor] = []
    for placed in scene.placed:
        layer = draw_subject(placed, artwork.sprites[scene.style, placed.subject], size)
        alpha = layer[3]
        image = image * (1 - alpha) + layer[:3]
        coverage = [below * (1 - alpha) for below in coverage] + [alpha]
    return Rendered(image.clamp(0, 1), torch.stack(coverage))


def render_batch(scenes: Sequence[Scene], artwork: Artwork, size: int = SIZE) -> Tensor:
    """Draw several scenes: (B, 3, size, size) in [0, 1]."""
    return torch.stack([render(scene, artwork, size).image for scene in scenes])


def draw_subject(placed: Placed, sprite: Tensor, size: int) -> Tensor:
    """Draw one subject on an empty canvas: (4, size, size), colours multiplied by alpha."""
    fine = size * SUPERSAMPLING
    while sprite.shape[-1] > 2 * placed.size * fine:
        sprite = F.avg_pool2d(sprite[None], 2)[0]
    cos = math.cos(placed.rotation) / placed.size
    sin = math.sin(placed.rotation) / placed.size
    x, y = 2 * placed.x - 1, 2 * placed.y - 1
    # Maps canvas coordinates in [-1, 1] to sprite coordinates: subtract the centre, turn back, scale.
    inverse = torch.tensor(
        [[cos, sin, -cos * x - sin * y], [-sin, cos, sin * x - cos * y]], device=sprite.device
    )
    grid = F.affine_grid(inverse[None], [1, 4, fine, fine], align_corners=False)
    drawn = F.grid_sample(sprite[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(drawn, SUPERSAMPLING)[0]


def draw_ground(ground: Ground, photographs: Mapping[str, Tensor], size: int) -> Tensor:
    """Draw the background: (3, size, size) in [0, 1]."""
    if ground.kind == "photograph":
        return crop_photograph(ground, photographs[ground.name], size)
    device = next(iter(photographs.values())).device if photographs else torch.device("cpu")
    color = torch.tensor(COLORS[ground.name], device=device)[:, None, None]
    if ground.kind == "plain":
        return color.expand(3, size, size).clone()
    axis = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    along = axis[:, None] * math.sin(ground.angle) + axis[None, :] * math.cos(ground.angle)
    return (color - GRADIENT * along).clamp(0, 1)


def crop_photograph(ground: Ground, photograph: Tensor, size: int) -> Tensor:
    """Cut a square out of a photograph: from `size` pixels (zoom 0) to its shorter side (zoom 1)."""
    height, width = photograph.shape[-2:]
    shorter = min(height, width)
    side = round(min(size, shorter) * (1 - ground.zoom) + shorter * ground.zoom)
    top = round(ground.v * (height - side))
    left = round(ground.u * (width - side))
    crop = photograph[:, top : top + side, left : left + side]
    return F.interpolate(crop[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True)[
        0
    ].clamp(0, 1)
