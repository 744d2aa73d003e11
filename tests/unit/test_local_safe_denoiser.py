"""Local mode: a subject is separated from others at any position, in any colour, and replaced by safe
content.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from safe_guidance.guidance.core.composition import Change, combine
from safe_guidance.guidance.core.noise_level import NoiseLevel
from safe_guidance.guidance.safe_denoiser.edge_descriptors import window_descriptors
from safe_guidance.guidance.safe_denoiser.local import LATEST_DECISION, Replacement, local_correction
from safe_guidance.guidance.safe_denoiser.patch_posterior import (
    PatchLibrary,
    _ranks,
    build_patch_library,
    patch_log_odds,
)
from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserSettings

SIDE = 32
CONFIG = SafeDenoiserSettings(strength=1.0, threshold=0.6, temperature=0.1, cap=5.0)
EARLY, LATE = NoiseLevel.variance_exploding(3.0), NoiseLevel.variance_exploding(LATEST_DECISION / 2)
WEDGE, BOX = "wedge", "box"


def shape(name: str) -> Tensor:
    """Draw a triangle or a square, 9 x 9."""
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0) - 4, indexing="ij")
    inside = x.abs() <= y / 2 if name == WEDGE else torch.ones(9, 9, dtype=torch.bool)
    return inside.double()


def make_image(seed: int, **corners: tuple[int, int]) -> Tensor:
    """Draw shapes of random colours, at their top left corners, on a faint background.

    (1, 4, SIDE, SIDE) float64.
    """
    generator = torch.Generator().manual_seed(seed)
    latent = 0.03 * torch.randn(1, 4, SIDE, SIDE, generator=generator, dtype=torch.float64)
    for name, (top, left) in corners.items():
        color = torch.randn(4, 1, 1, generator=generator, dtype=torch.float64)
        latent[0, :, top : top + 9, left : left + 9] += color / color.norm() * shape(name)
    return latent


def region(top: int, left: int) -> Tensor:
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)
    mask[..., top - 1 : top + 10, left - 1 : left + 10] = 1
    return mask


CORNERS = [
    ((2, 2), (20, 20)),
    ((2, 20), (20, 4)),
    ((20, 2), (4, 20)),
    ((19, 19), (2, 2)),
    ((4, 12), (21, 12)),
    ((12, 3), (12, 21)),
]
LATENTS = torch.cat([make_image(seed, wedge=w, box=b) for seed, (w, b) in enumerate(CORNERS * 3)])
REGIONS = torch.cat([region(*w) for w, _ in CORNERS * 3])
LIBRARY = build_patch_library(LATENTS, REGIONS, CONFIG.temperature)


def correct(
    x: Tensor,
    config: SafeDenoiserSettings = CONFIG,
    library: PatchLibrary = LIBRARY,
    before: Replacement | None = None,
    level: NoiseLevel = EARLY,
    mask: Tensor | None = None,
) -> Tensor:
    result, _ = local_correction(x, library, config, before or Replacement.none(x), level, mask)
    return combine(x, [Change(result.delta, result.gate > 0, config.cap)], mask)


def score(x: Tensor, library: PatchLibrary = LIBRARY) -> float:
    """Return the highest log-odds as a share of the set's own."""
    return (patch_log_odds(x, library)[0].amax() / library.typical).item()


def test_tells_the_subject_from_others_at_positions_and_in_colours_that_no_reference_has() -> None:
    for seed, position in enumerate([(8, 14), (21, 9), (5, 6)]):
        assert score(make_image(100 + seed, wedge=position)) > 0.4
        assert score(make_image(200 + seed, box=position)) < 0.1
        assert score(make_image(300 + seed)) < 0.1


def test_without_neutral_windows_every_shape_resembles_the_subject() -> None:
    """The density of unwanted windows alone separates the two shapes less than the log-odds do."""
    unwanted_only = replace(LIBRARY, neutral=LIBRARY.neutral[-1:])

    def margin(library: PatchLibrary) -> float:
        wedges = [score(make_image(100 + s, wedge=(8, 14)), library) for s in range(6)]
        boxes = [score(make_image(200 + s, box=(8, 14)), library) for s in range(6)]
        return min(wedges) - max(boxes)

    assert margin(LIBRARY) > margin(unwanted_only)


def test_log_odds_equal_a_loop() -> None:
    """A second derivation in float64 gives the same.

    Kernels summed window by window, from windows cut one by one.
    """
    x = make_image(101, wedge=(8, 14))
    odds, _ = patch_log_odds(x, LIBRARY)
    window, factor = LIBRARY.window, LIBRARY.factor
    dx = F.pad(x[..., 2:] - x[..., :-2], (1, 1))[0]
    dy = F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))[0]
    strength = (dx.square() + dy.square()).sum(0).clamp_min(1e-12).sqrt()
    edges = torch.stack(
        [strength, (dx.square() - dy.square()).sum(0) / strength, 2 * (dx * dy).sum(0) / strength]
    )
    coarse = F.pad(F.avg_pool2d(edges, factor), (window // 2,) * 4, mode="replicate")
    y, z = torch.meshgrid(
        torch.arange(window) - window // 2, torch.arange(window) - window // 2, indexing="ij"
    )
    weight = torch.exp(-(y**2 + z**2).double() / (2 * (window / 2.6) ** 2))
    cuts = [[weight * coarse[:, i : i + window, j : j + window] for j in range(16)] for i in range(16)]
    longest = max(c.norm() for row in cuts for c in row)
    for row, column in [(6, 9), (0, 0), (15, 7)]:
        description = cuts[row][column].flatten() / (cuts[row][column].norm() + 0.1 * longest)
        own = (description - LIBRARY.mean) @ LIBRARY.axes
        density = [
            sum(math.exp(-float((own - other).square().sum() / LIBRARY.bandwidth)) for other in others)
            / len(others)
            for others in (LIBRARY.unwanted, LIBRARY.neutral)
        ]
        assert odds[0, row, column].item() == pytest.approx(math.log(density[0] / density[1]), abs=1e-6)


def test_replaces_the_subject_and_leaves_the_rest_bit_identical() -> None:
    x = make_image(101, wedge=(6, 12), box=(21, 2))
    corrected = correct(x)
    assert score(corrected) < 0.6 < score(x)
    near = F.max_pool2d(region(6, 12), 9, stride=1, padding=4).bool()
    untouched = ~near.expand_as(x)
    assert torch.equal(corrected[untouched], x[untouched]) and not torch.equal(corrected, x)


def test_strength_is_the_share_that_is_replaced() -> None:
    x = make_image(101, wedge=(6, 12))
    torch.testing.assert_close(
        correct(x, replace(CONFIG, strength=0.5)) - x, (correct(x) - x) / 2, atol=1e-12, rtol=0
    )


def test_contrast_and_colours_do_not_matter_for_what_is_found() -> None:
    x = make_image(101, wedge=(6, 12))
    rotation = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).Q
    for other in (4 * x, torch.einsum("cd,bdhw->bchw", rotation, x)):
        torch.testing.assert_close(
            patch_log_odds(other, LIBRARY)[0], patch_log_odds(x, LIBRARY)[0], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("steps", [(2, 0), (0, 3), (1, 2)])
def test_translating_the_image_translates_the_correction(steps: tuple[int, int]) -> None:
    """The correction is equivariant to shifts by whole steps of the grid, away from the border."""
    x = torch.zeros(1, 4, 3 * SIDE, 3 * SIDE, dtype=torch.float64)
    x[..., SIDE : 2 * SIDE, SIDE : 2 * SIDE] = make_image(101, wedge=(10, 10)) * F.pad(
        torch.ones(20, 20), (6, 6, 6, 6)
    )
    x = x[..., 16:-16, 16:-16]
    # This larger image is searched at the references' scale: factor belongs to the library.
    shift = tuple(LIBRARY.factor * s for s in steps)
    moved = x.roll(shift, (2, 3))
    torch.testing.assert_close(
        correct(moved) - moved, (correct(x) - x).roll(shift, (2, 3)), atol=1e-9, rtol=0
    )
    assert not torch.equal(correct(x), x)


def test_the_order_of_the_set_does_not_matter() -> None:
    order = torch.randperm(len(LATENTS), generator=torch.Generator().manual_seed(2))
    shuffled = build_patch_library(LATENTS[order], REGIONS[order], CONFIG.temperature)
    x = make_image(101, wedge=(6, 12))
    torch.testing.assert_close(shuffled.typical, LIBRARY.typical, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        patch_log_odds(x, shuffled)[0], patch_log_odds(x, LIBRARY)[0], atol=1e-7, rtol=0
    )
    torch.testing.assert_close(correct(x, library=shuffled), correct(x), atol=1e-9, rtol=0)


def test_identities() -> None:
    x = make_image(101, wedge=(6, 12))
    assert torch.equal(correct(x, replace(CONFIG, strength=0.0)), x)
    assert torch.equal(correct(x, replace(CONFIG, threshold=50.0)), x)
    assert torch.equal(correct(x, level=LATE), x)
    assert torch.equal(correct(x, mask=torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)), x)
    harmless = make_image(201, box=(8, 14))
    assert torch.equal(correct(harmless), harmless)


def test_a_mask_limits_where_the_method_searches_and_acts() -> None:
    x, mask = make_image(101, wedge=(6, 12)), torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)
    mask[..., 22:, :] = 1
    assert torch.equal(correct(x, mask=mask), x)
    mask[..., :14, :] = 1
    corrected = correct(x, mask=mask)
    assert torch.equal(corrected[..., 14:22, :], x[..., 14:22, :]) and not torch.equal(corrected, x)


def test_decisions_stay_in_force() -> None:
    """A later prediction without the subject is still replaced there, by the same content."""
    x, clean = make_image(101, wedge=(6, 12)), make_image(102)
    _, decided = local_correction(x, LIBRARY, CONFIG, Replacement.none(x), EARLY)
    for level in (EARLY, LATE):
        corrected = correct(clean, before=decided, level=level)
        inside = (decided.area == 1).expand_as(clean)
        assert bool(inside.any())
        torch.testing.assert_close(corrected[inside], decided.content[inside], atol=1e-12, rtol=0)


def test_batch_equals_single_calls() -> None:
    batch = torch.cat(
        [make_image(101, wedge=(6, 12)), make_image(201, box=(8, 14)), make_image(102, wedge=(20, 3))]
    )
    torch.testing.assert_close(
        correct(batch), torch.cat([correct(x[None]) for x in batch]), atol=1e-10, rtol=0
    )
    assert torch.equal(correct(batch)[1], batch[1])


def test_an_image_without_a_region_is_a_neutral_reference() -> None:
    crossed = make_image(400, box=(10, 10))
    taught = build_patch_library(
        torch.cat([LATENTS, crossed]), torch.cat([REGIONS, torch.zeros(1, 1, SIDE, SIDE)]), CONFIG.temperature
    )
    assert len(taught.unwanted) == len(LIBRARY.unwanted) and len(taught.neutral) > len(LIBRARY.neutral)
    assert bool(taught.outside[-1].all())


def test_an_image_that_is_unwanted_as_a_whole_is_left_out() -> None:
    with_whole = build_patch_library(
        torch.cat([LATENTS, LATENTS[:1]]), torch.cat([REGIONS, torch.ones(1, 1, SIDE, SIDE)]), 0.1
    )
    assert len(with_whole.unwanted) == len(LIBRARY.unwanted) and len(with_whole.latents) == len(LATENTS)


@pytest.mark.parametrize(("height", "width", "count"), [(13, 17, 3), (32, 21, 1), (64, 40, 2)])
def test_odd_sizes_and_few_images(height: int, width: int, count: int) -> None:
    latents = torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(0))
    regions = torch.zeros(count, 1, height, width)
    regions[:, :, 2:9, 3:11] = 1
    library = build_patch_library(latents, regions, 0.1)
    config = replace(CONFIG, threshold=0.01)
    result, _ = local_correction(latents, library, config, Replacement.none(latents), EARLY)
    assert result.delta.shape == latents.shape and bool(torch.isfinite(result.delta).all())
    assert bool((result.gate > 0).all())


def test_flat_images_are_harmless() -> None:
    flat = torch.ones(1, 4, SIDE, SIDE, dtype=torch.float64)
    assert torch.equal(correct(flat), flat)
    assert bool(torch.isfinite(window_descriptors(flat, 11, 2)).all())
    library = build_patch_library(torch.ones(3, 4, SIDE, SIDE), REGIONS[:3].float(), 0.1)
    result, _ = local_correction(
        torch.randn(1, 4, SIDE, SIDE), library, CONFIG, Replacement.none(torch.ones(1, 4, SIDE, SIDE)), EARLY
    )
    assert bool(torch.isfinite(result.delta).all())


def test_images_that_are_nearly_all_subject_keep_the_neutral_windows_they_have() -> None:
    assert [_ranks(count) for count in (0, 1, 4)] == [[], [0], [0, 1, 2, 3]]
    assert _ranks(5) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert _ranks(14) == [0, 1, 2, 3, 4, 7, 10, 13]
    for margin in range(1, 8):
        regions = torch.zeros(4, 1, SIDE, SIDE, dtype=torch.float64)
        regions[:, :, margin : SIDE - margin, margin : SIDE - margin] = 1
        # One neutral image, for those sets whose windows all hold too much of the subject.
        latents = torch.cat([LATENTS[:4], make_image(400)])
        library = build_patch_library(latents, torch.cat([regions, torch.zeros_like(regions[:1])]), 0.1)
        assert bool(torch.isfinite(library.neutral).all()) and len(library.neutral) >= 8
