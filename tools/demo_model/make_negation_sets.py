"""Draw the bundled negation sets.

Scenes with the concept, each with the mask of the star, scenes in the artist's style, the first four of
these for those who want to see how few are enough, and safe scenes, whose masks are empty.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

import common
import world

negation_set = common.pack_module("formats.negation_set")
SOURCE = "drawn by tools/demo_model/make_negation_sets.py"
LICENCE = "GPL-3.0-or-later"
MARGIN = 7
"""Pixels around a star that belong to its mask, so that its outline is part of what is compared."""


def concept_scenes(count: int, seed: int) -> list[world.Scene]:
    """Return scenes of one star, alone or with another shape, over all colours, places and styles."""
    rng = random.Random(seed)
    others = tuple(name for name in world.SHAPES if name != world.CONCEPT)
    return [world.sample_scene(rng, shape=world.CONCEPT, shapes=others) for _ in range(count)]


def style_scenes(count: int, seed: int, style: str = world.ARTIST_STYLE) -> list[world.Scene]:
    rng = random.Random(seed)
    return [world.sample_scene(rng, style=style) for _ in range(count)]


def concept_mask(scene: world.Scene, masks: torch.Tensor) -> torch.Tensor:
    """Return the union of the stars' masks, widened by MARGIN: (SIZE, SIZE)."""
    stars = [mask for shape, mask in zip(scene.shapes, masks) if shape.name == world.CONCEPT]
    union = torch.stack(stars).amax(0)
    return torch.nn.functional.max_pool2d(union[None, None], 2 * MARGIN + 1, stride=1, padding=MARGIN)[0, 0]


def no_mask(scene: world.Scene, masks: torch.Tensor) -> torch.Tensor:
    """Return an empty mask, (SIZE, SIZE) zeros: nothing in the scene is unwanted."""
    return torch.zeros_like(masks[0])


def build(
    name: str, scenes: list[world.Scene], mask: Callable[[world.Scene, torch.Tensor], torch.Tensor] | None
) -> None:
    rendered = [world.render(scene) for scene in scenes]
    images = torch.stack([image for image, _ in rendered]).movedim(1, -1)
    masks = (
        torch.stack([mask(scene, m) for scene, (_, m) in zip(scenes, rendered)]) if mask is not None else None
    )
    built = negation_set.from_images(images, masks, name, SOURCE, LICENCE)
    path = common.ASSETS / "negation_sets" / f"{name}.safetensors"
    negation_set.save(built, path)
    common.log.info("%s: %d images, %.1f MB", path.name, len(built), path.stat().st_size / 1e6)


def main() -> None:
    parser = common.argument_parser(__doc__, steps=0, batch=0)
    parser.add_argument("--concept", type=int, default=96, help="images in the concept's set")
    parser.add_argument("--style", type=int, default=32, help="images in the style's set")
    parser.add_argument("--few", type=int, default=4, help="images in the style's small set")
    parser.add_argument("--fine", type=int, default=16, help="images in the set of safe references")
    args = parser.parse_args()
    build("demo_star", concept_scenes(args.concept, seed=41), concept_mask)
    build("demo_hatched", style_scenes(args.style, seed=42), None)
    build("demo_hatched_few", style_scenes(args.few, seed=42), None)
    build("demo_fine", style_scenes(args.fine, seed=43, style="flat"), no_mask)


if __name__ == "__main__":
    main()
