"""A small annotated set from the demo model's world, to learn guideline tokens from."""

from __future__ import annotations

import random

import torch
from comfy_api.latest import io

from ..demo import world as world
from .shared_inputs import seed_input

IMPLYING_SHARE = 0.12
"""Of the images with stars, those that captions describe without the word."""


def annotated_scenes(count: int, seed: int) -> tuple[list[world.Scene], list[world.Scene]]:
    """As many scenes with stars as without."""
    rng = random.Random(seed)
    others = tuple(name for name in world.SHAPES if name != world.CONCEPT)

    def with_concept() -> world.Scene:
        implied = rng.random() < IMPLYING_SHARE
        return (
            world.implying_scene(rng)
            if implied
            else world.sample_scene(rng, shape=world.CONCEPT, shapes=others)
        )

    return [with_concept() for _ in range(count)], [
        world.sample_scene(rng, shapes=others) for _ in range(count)
    ]


def draw(scenes: list[world.Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 128, 128, 3) and masks of the stars in them (N, 128, 128)."""
    images, masks = [], []
    for scene in scenes:
        image, of_shapes = world.render(scene)
        stars = [mask for shape, mask in zip(scene.shapes, of_shapes) if shape.name == world.CONCEPT]
        images.append(image.movedim(0, -1))
        masks.append(torch.stack(stars).amax(0) if stars else torch.zeros(world.SIZE, world.SIZE))
    return torch.stack(images), torch.stack(masks)


class DemoAnnotatedSet(io.ComfyNode):
    """Images of the demo world with their masks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceDemoAnnotatedSet",
            display_name="Demo Annotated Set",
            category="safe guidance/detect and guide",
            description="Draws images of the demo model's world: some with stars and their masks, "
            "and as many without stars. Use it to learn guideline tokens without "
            "collecting images.",
            search_aliases=[
                "demo",
                "example images",
                "annotated images",
                "training set",
                "dag",
                "guideline tokens",
            ],
            inputs=[
                io.Int.Input(
                    "count",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="Number of images with stars; as many without stars are added. More images "
                    "teach better and take longer. Start with 16.",
                ),
                seed_input("Seed that chooses the images. The same seed gives the same images."),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Mask.Output(display_name="masks"),
                io.Image.Output(display_name="safe_images"),
                io.String.Output(display_name="captions"),
            ],
        )

    @classmethod
    def execute(cls, count: int, seed: int) -> io.NodeOutput:
        shown, safe = annotated_scenes(count, seed)
        rng = random.Random(seed)
        captions = "\n".join(world.describe(scene, rng) for scene in [*shown, *safe])
        images, masks = draw(shown)
        return io.NodeOutput(images, masks, draw(safe)[0], captions)


NODES: list[type[io.ComfyNode]] = [DemoAnnotatedSet]
