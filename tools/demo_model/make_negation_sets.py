"""Draw the bundled negation sets.

They are scenes with the concept and the masks of its stars, scenes in the artist's style, the first four of
these as a small set, and neutral scenes with empty masks.
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
"""Pixels around a star that belong to its mask, so that its outline is compared as well."""


def concept_scenes(count: int, seed: int) -> list[world.Scene]:
    """Sample scenes with one star each, in all colours, places, styles and backgrounds."""
    rng = random.Random(seed)
    others = tuple(name for name in world.SHAPES if name != world.CONCEPT)
    return [world.sample_scene(rng, shape=world.CONCEPT, shapes=others) for _ in range(count)]


def style_scenes(count: int, seed: int, style: str = world.ARTIST_STYLE) -> list[world.Scene]:
    """Sample scenes in a style."""
    rng = random.Random(seed)
    return [world.sample_scene(rng, style=style) for _ in range(count)]


def concept_mask(scene: world.Scene, masks: torch.Tensor) -> torch.Tensor:
    """Merge the stars' masks and widen them by MARGIN: (SIZE, SIZE)."""
    stars = [mask for shape, mask in zip(scene.shapes, masks) if shape.name == world.CONCEPT]
    union = torch.stack(stars).amax(0)
    return torch.nn.functional.max_pool2d(union[None, None], 2 * MARGIN + 1, stride=1, padding=MARGIN)[0, 0]


def no_mask(scene: world.Scene, masks: torch.Tensor) -> torch.Tensor:
    """Make the empty mask of a neutral scene: (SIZE, SIZE) of zeros."""
    return torch.zeros_like(masks[0])


def build(
    name: str, scenes: list[world.Scene], mask: Callable[[world.Scene, torch.Tensor], torch.Tensor] | None
) -> None:
    """Render scenes and save them as a negation set."""
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
    """Make all sets."""
    parser = common.argument_parser(__doc__, steps=0, batch=0)
    parser.add_argument("--concept", type=int, default=96, help="images in the concept's set")
    parser.add_argument("--style", type=int, default=32, help="images in the style's set")
    parser.add_argument("--few", type=int, default=4, help="images in the style's small set")
    parser.add_argument("--fine", type=int, default=16, help="images in the neutral set")
    args = parser.parse_args()
    build("demo_star", concept_scenes(args.concept, seed=41), concept_mask)
    build("demo_hatched", style_scenes(args.style, seed=42), None)
    build("demo_hatched_few", style_scenes(args.few, seed=42), None)
    build("demo_fine", style_scenes(args.fine, seed=43, style="flat"), no_mask)


if __name__ == "__main__":
    main()
