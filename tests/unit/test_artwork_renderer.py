"""The artwork world's renderer: every mask is the exact shape of its subject, less what covers it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from safe_guidance.demo import artwork_world as world
from safe_guidance.demo.artwork_renderer import Artwork, crop_photograph, draw_ground, draw_subject, render
from safe_guidance.demo.artwork_subjects import COLORS, PHOTOGRAPHS, STYLES, SUBJECTS
from safe_guidance.demo.artwork_world import Ground, Placed, Scene

RED, GREEN = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
WHITE = Ground("plain", "white")


def square(color: tuple[float, float, float], side: int = 192) -> Tensor:
    """Return an opaque sprite of one colour."""
    return torch.tensor([*color, 1.0])[:, None, None].expand(4, side, side).clone()


@pytest.fixture
def artwork() -> Artwork:
    """Return red for "dagger", green for "cat" and noise with random alpha for all else."""
    generator = torch.Generator().manual_seed(0)
    sprites = {}
    for style in STYLES:
        for subject in SUBJECTS:
            alpha = torch.rand(1, 24, 24, generator=generator)
            sprites[style, subject.name] = torch.cat(
                [torch.rand(3, 24, 24, generator=generator) * alpha, alpha]
            )
    sprites["3d", "dagger"], sprites["3d", "cat"] = square(RED), square(GREEN)
    photographs = {name: torch.rand(3, 80, 130, generator=generator) for name in PHOTOGRAPHS}
    return Artwork(sprites, photographs)


def test_the_mask_of_an_upright_square_is_the_square(artwork: Artwork) -> None:
    drawn = render(Scene((Placed("dagger", 0.5, 0.5, 0.5, 0.0),), "3d", WHITE), artwork)
    expected = torch.zeros(128, 128, dtype=torch.bool)
    expected[32:96, 32:96] = True
    assert torch.equal(drawn.masks[0], expected)
    assert torch.allclose(drawn.image[:, expected], torch.tensor(RED)[:, None], atol=1e-5)
    assert torch.allclose(drawn.image[:, ~expected], torch.tensor(COLORS["white"])[:, None], atol=1e-5)


def test_a_subject_in_front_takes_its_pixels_from_the_mask_behind(artwork: Artwork) -> None:
    behind, front = Placed("dagger", 0.375, 0.5, 0.5, 0.0), Placed("cat", 0.625, 0.5, 0.5, 0.0)
    drawn = render(Scene((behind, front), "3d", WHITE), artwork)
    expected = torch.zeros(2, 128, 128, dtype=torch.bool)
    expected[0, 32:96, 16:48] = True
    expected[1, 32:96, 48:112] = True
    assert torch.equal(drawn.masks, expected)


def test_image_is_the_sum_of_ground_and_visible_subjects(artwork: Artwork) -> None:
    rng = random.Random(1)
    for _ in range(5):
        scene = world.sample_scene(rng, ["dagger", "cat"], style="3d", ground=WHITE)
        drawn = render(scene, artwork)
        rest = 1 - drawn.coverage.sum(0)
        assert rest.amin() >= -1e-5
        parts = [torch.tensor(c)[:, None, None] * m for c, m in zip((RED, GREEN), drawn.coverage)]
        expected = sum(parts, torch.tensor(COLORS["white"])[:, None, None] * rest)
        assert torch.allclose(drawn.image, expected, atol=1e-5)


def test_masks_never_overlap_and_every_subject_is_seen(artwork: Artwork) -> None:
    for style in STYLES:
        for subject in SUBJECTS:
            artwork.sprites[style, subject.name].copy_(
                square(RED, artwork.sprites[style, subject.name].shape[-1])
            )  # type: ignore[index]
    for scene in world.sample_scenes(40, seed=2):
        masks = render(scene, artwork).masks
        assert masks.shape == (len(scene.placed), 128, 128)
        assert masks.sum(0).amax() <= 1
        for mask, placed in zip(masks, scene.placed):
            assert mask.sum() > 0.5 * (placed.size * 128) ** 2


def test_rotation_is_clockwise_and_keeps_the_area() -> None:
    sprite = torch.zeros(4, 64, 64)
    sprite[:, :32, :32] = 1.0
    upright = draw_subject(Placed("cat", 0.5, 0.5, 0.5, 0.0), sprite, 128)[3]
    turned = draw_subject(Placed("cat", 0.5, 0.5, 0.5, math.pi / 2), sprite, 128)[3]
    assert upright[:64, :64].sum() > 1000 and upright[:64, 64:].sum() < 40
    assert turned[:64, 64:].sum() > 1000 and turned[:64, :64].sum() < 40
    tilted = draw_subject(Placed("cat", 0.5, 0.5, 0.5, 0.3), sprite, 128)[3]
    assert math.isclose(tilted.sum(), upright.sum(), rel_tol=0.02)


def test_twice_the_size_shows_the_same_scene(artwork: Artwork) -> None:
    scene = world.sample_scene(random.Random(3), ["dagger", "cat"], style="3d", ground=WHITE)
    small, large = render(scene, artwork), render(scene, artwork, size=256)
    reduced = torch.nn.functional.avg_pool2d(large.image[None], 2)[0]
    assert (reduced - small.image).abs().mean() < 0.005


def test_the_same_scene_gives_the_same_image(artwork: Artwork) -> None:
    scene = world.sample_scenes(1, seed=4)[0]
    assert torch.equal(render(scene, artwork).image, render(scene, artwork).image)


def test_a_graded_ground_has_its_color_in_the_middle_and_gets_darker_along_its_angle() -> None:
    ground = draw_ground(Ground("graded", "grey", angle=0.0), {}, 64)
    assert torch.allclose(ground[:, :, 31:33].mean((1, 2)), torch.tensor(COLORS["grey"]), atol=0.01)
    assert (ground.diff(dim=2) < 0).all() and torch.allclose(ground[:, 0], ground[:, -1])


@pytest.mark.parametrize(("u", "v", "zoom"), [(0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.5, 0.3, 1.0)])
def test_crops_of_a_photograph_stay_inside(u: float, v: float, zoom: float) -> None:
    photograph = torch.rand(3, 200, 300)
    crop = crop_photograph(Ground("photograph", "grass", 0.0, u, v, zoom), photograph, 128)
    assert crop.shape == (3, 128, 128) and crop.amin() >= 0 and crop.amax() <= 1
    if zoom == 0.0 and u == 0.0:
        assert torch.allclose(crop, photograph[:, :128, :128], atol=1e-5)
