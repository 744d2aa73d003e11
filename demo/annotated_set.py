"""Annotated images of the demo world: scenes with stars and masks of the stars, and scenes without stars."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from . import world

IMPLYING_SHARE = 0.12
"""Share of the scenes with stars whose captions do not contain the word."""


@dataclass(frozen=True)
class AnnotatedSet:
    """Scenes with and without stars.

    Attributes:
        images: (N, SIZE, SIZE, 3) in [0, 1], with stars.
        masks: (N, SIZE, SIZE), 1 where a star is.
        safe_images: (N, SIZE, SIZE, 3) in [0, 1], without stars.
        captions: 2 N texts, those of `images` first.
    """

    images: Tensor
    masks: Tensor
    safe_images: Tensor
    captions: tuple[str, ...]


def draw_annotated_set(count: int, seed: int) -> AnnotatedSet:
    """Draw `count` scenes with stars and as many without. The same seed gives the same set."""
    shown, safe = annotated_scenes(count, seed)
    rng = random.Random(seed)
    captions = tuple(world.write_caption(scene, rng) for scene in [*shown, *safe])
    images, masks = render_with_masks(shown)
    safe_images, _ = render_with_masks(safe)
    return AnnotatedSet(images, masks, safe_images, captions)


def annotated_scenes(count: int, seed: int) -> tuple[list[world.Scene], list[world.Scene]]:
    """Return `count` scenes with a star and `count` scenes without one."""
    rng = random.Random(seed)
    others = tuple(name for name in world.SHAPES if name != world.CONCEPT)

    def with_star() -> world.Scene:
        if rng.random() < IMPLYING_SHARE:
            return world.implying_scene(rng)
        return world.sample_scene(rng, shape=world.CONCEPT, shapes=others)

    shown = [with_star() for _ in range(count)]
    safe = [world.sample_scene(rng, shapes=others) for _ in range(count)]
    return shown, safe


def render_with_masks(scenes: list[world.Scene]) -> tuple[Tensor, Tensor]:
    """Render images (N, SIZE, SIZE, 3) in [0, 1] and masks (N, SIZE, SIZE) of the stars in them."""
    images, masks = [], []
    for scene in scenes:
        image, shape_masks = world.render(scene)
        stars = [mask for shape, mask in zip(scene.shapes, shape_masks) if shape.name == world.CONCEPT]
        images.append(image.movedim(0, -1))
        masks.append(torch.stack(stars).amax(0) if stars else torch.zeros(world.SIZE, world.SIZE))
    return torch.stack(images), torch.stack(masks)
