"""Shapes found in images, against the renderer's own masks."""

from __future__ import annotations

import random

import pytest
import torch

from safe_guidance.demo import world as world
from safe_guidance.evaluation.judges.locate import locate
from safe_guidance.evaluation.prompt_sets.prompts import Record

OTHERS = tuple(name for name in world.SHAPES if name != world.CONCEPT)


def record(scene: world.Scene) -> Record:
    shapes, colors = tuple(s.name for s in scene.shapes), tuple(s.color for s in scene.shapes)
    return Record("x", "", 0, shapes, colors, scene.style, scene.background, scene.pattern)


@pytest.mark.parametrize("style", world.STYLES)
def test_located_stars_are_where_they_were_drawn(style: str) -> None:
    rng = random.Random(3)
    overlaps = []
    for _ in range(12):
        scene = world.sample_scene(rng, shape=world.CONCEPT, style=style, shapes=OTHERS)
        image, masks = world.render(scene)
        found = locate(image, record(scene), world.CONCEPT)
        assert found is not None
        index = record(scene).shapes.index(world.CONCEPT)
        true = masks[index] > 0
        overlaps.append(float((found.mask & true).sum() / (found.mask | true).sum()))
        assert not (true & found.surroundings).any()
        star = scene.shapes[index]
        assert abs((found.center[1] + 0.5) / world.SIZE * 2 - 1 - star.x) < 0.05
        assert abs((found.center[0] + 0.5) / world.SIZE * 2 - 1 - star.y) < 0.05
    assert sum(overlaps) / len(overlaps) > 0.85


def test_shapes_that_a_prompt_does_not_name_are_not_located() -> None:
    silent = Record("x", "the night sky", 0, (), (), None, None, None)
    assert locate(torch.rand(3, world.SIZE, world.SIZE), silent, world.CONCEPT) is None
