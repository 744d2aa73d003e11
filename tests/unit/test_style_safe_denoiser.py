"""Style mode: a texture that a few images share is found at any position, and removed from the shapes
drawn with it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safe_guidance.guidance.core.composition import Change, combine
from safe_guidance.guidance.safe_denoiser import style_posterior
from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserSettings
from safe_guidance.guidance.safe_denoiser.style import StyledArea, style_correction
from safe_guidance.guidance.safe_denoiser.style_posterior import (
    LEAST_LEAD,
    SHARE,
    WINDOW,
    StyleLibrary,
    build_style_library,
    style_log_odds,
    window_log_odds,
    windows,
    without_style,
)

SIDE = 24
CONFIG = SafeDenoiserSettings(strength=1.0, threshold=0.2, cap=5.0)
ROWS, COLUMNS = torch.meshgrid(
    torch.arange(SIDE, dtype=torch.float64), torch.arange(SIDE, dtype=torch.float64), indexing="ij"
)
WAVE = 0.8 * torch.cos(2 * math.pi * (COLUMNS - ROWS) / 3.5)


def make_image(seed: int, styled: bool) -> Tensor:
    """Draw a disc of random colour, position and size on a plain background, with waves when styled.

    (1, 3, SIDE, SIDE).
    """
    generator = torch.Generator().manual_seed(seed)
    color, ground = torch.randn(2, 3, 1, 1, generator=generator, dtype=torch.float64)
    centre = 9 + 6 * torch.rand(2, generator=generator, dtype=torch.float64)
    radius = 5 + 2 * torch.rand((), generator=generator, dtype=torch.float64)
    disc = (radius - ((ROWS - centre[0]) ** 2 + (COLUMNS - centre[1]) ** 2).sqrt() + 0.5).clamp(0, 1)
    texture = 1 + WAVE if styled else torch.ones_like(WAVE)
    noise = 0.01 * torch.randn(3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return (ground * (1 - disc) + color * texture * disc + noise)[None]


LATENTS = torch.cat([make_image(seed, seed < 4) for seed in range(16)])
REGIONS = torch.cat(
    [torch.full((1, 1, SIDE, SIDE), float(seed < 4), dtype=torch.float64) for seed in range(16)]
)
LIBRARY = build_style_library(LATENTS, REGIONS)
STYLED, FLAT = make_image(100, True), make_image(100, False)


def correct(
    x: Tensor,
    config: SafeDenoiserSettings = CONFIG,
    library: StyleLibrary = LIBRARY,
    before: StyledArea | None = None,
    mask: Tensor | None = None,
    unconditional: Tensor | None = None,
) -> Tensor:
    anchor = x if unconditional is None else unconditional
    result, _ = style_correction(x, anchor, library, config, before or StyledArea.none(x), mask)
    return combine(x, [Change(result.delta, result.gate > 0, config.cap)], mask)


def share_of_wave(x: Tensor, like: Tensor) -> float:
    """Return the share of the wave of `like` that is left in `x`, by least squares on the difference from
    the flat image.
    """
    wave = like - FLAT
    return (((x - FLAT) * wave).sum() / wave.square().sum()).item()


def test_four_images_define_the_style_in_colours_positions_and_sizes_that_none_of_them_has() -> None:
    """A texture in a colour far from the four may be missed; a flat image is never mistaken for the style."""
    limit = LIBRARY.neutral_highest + CONFIG.threshold * (LIBRARY.typical - LIBRARY.neutral_highest)
    found = [
        [bool(style_log_odds(make_image(seed, styled), LIBRARY).amax() > limit) for seed in range(100, 112)]
        for styled in (True, False)
    ]
    assert sum(found[0]) >= 10 and sum(found[1]) == 0


def test_odds_are_the_density_of_directions() -> None:
    """A second derivation in two dimensions.

    Both normal densities are integrated along the ray through a window.
    """
    style, safe = (
        torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double(),
        torch.tensor([[0.5, 0.0], [0.0, 3.0]]).double(),
    )
    radius = torch.linspace(0, 60, 60001, dtype=torch.float64)

    def along_ray(direction: Tensor, covariance: Tensor) -> float:
        square = direction @ torch.linalg.inv(covariance) @ direction
        return torch.trapezoid(radius * torch.exp(-square * radius**2 / 2), radius).item() / math.sqrt(
            torch.linalg.det(covariance).item()
        )

    constant = 0.5 * (torch.logdet(safe) - torch.logdet(style)).item()
    for angle in torch.linspace(0, 3, 7, dtype=torch.float64):
        direction = torch.stack([angle.cos(), angle.sin()])
        expected = math.log(along_ray(direction, style) / along_ray(direction, safe))
        odds = window_log_odds(
            direction[None], torch.linalg.inv(safe), torch.linalg.inv(style), torch.tensor(0.1)
        ).item()
        assert 2 * odds + constant == pytest.approx(expected, abs=1e-6)


def test_windows_are_those_cut_one_by_one() -> None:
    y, mean = windows(STYLED)
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weight = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * (WINDOW / 3) ** 2))
    for row, column in [(7, 9), (12, 4)]:
        cut = STYLED[0, :, row - 2 : row + 3, column - 2 : column + 3]
        own = (cut * weight).sum((1, 2), keepdim=True) / weight.sum()
        torch.testing.assert_close(y[0, row * SIDE + column], (cut - own).flatten())
        torch.testing.assert_close(mean[0, row * SIDE + column, :, 0], own[:, 0, 0])


def test_content_is_the_posterior_mean_of_a_sum() -> None:
    """A second derivation by precisions.

    (S^-1 + V^-1)^-1 V^-1 y is the mean of s given s + v = y, V the style's share.
    """
    safe, style = (
        torch.linalg.inv(LIBRARY.neutral_precision),
        SHARE * torch.linalg.inv(LIBRARY.style_precision),
    )
    expected = torch.linalg.inv(torch.linalg.inv(safe) + torch.linalg.inv(style)) @ torch.linalg.inv(style)
    torch.testing.assert_close(LIBRARY.content_filter, expected, atol=1e-6, rtol=1e-6)


def test_plain_areas_are_all_content() -> None:
    plain = torch.randn(1, 3, 1, 1, dtype=torch.float64).expand(1, 3, SIDE, SIDE)
    torch.testing.assert_close(without_style(plain, LIBRARY), plain)


def test_removes_the_texture_and_keeps_colour_and_outline() -> None:
    corrected = correct(STYLED)
    assert share_of_wave(corrected, STYLED) < 0.4
    inside = (STYLED - FLAT).abs().sum(1, keepdim=True) > 0.1
    far = torch.nn.functional.max_pool2d(inside.double(), 13, 1, 6) == 0
    assert torch.equal(corrected[far.expand_as(STYLED)], STYLED[far.expand_as(STYLED)])
    means = [x[inside.expand_as(x)].view(3, -1).mean(1) for x in (corrected, STYLED)]
    torch.testing.assert_close(means[0], means[1], atol=0.1, rtol=0.1)


def test_guidance_is_removed_where_the_method_acts() -> None:
    """With full area and strength the result is the unconditional prediction, which is flat here, without
    its style.
    """
    everywhere = StyledArea(torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64))
    calm = make_image(301, False)
    still = (style_log_odds(calm, LIBRARY) <= LIBRARY.neutral_median).all()
    assert bool(still)
    torch.testing.assert_close(correct(STYLED, before=everywhere, unconditional=calm), calm)


def test_strength_is_the_share_that_is_replaced() -> None:
    torch.testing.assert_close(
        correct(STYLED, replace(CONFIG, strength=0.5)) - STYLED, (correct(STYLED) - STYLED) / 2
    )


def test_contrast_and_brightness_do_not_matter_for_what_is_found() -> None:
    torch.testing.assert_close(
        style_log_odds(4 * STYLED - 1, LIBRARY).amax(),
        style_log_odds(STYLED, LIBRARY).amax(),
        atol=0.02,
        rtol=0,
    )


def test_translating_the_image_translates_what_is_found() -> None:
    wide = torch.nn.functional.pad(STYLED, (8, 8, 8, 8), mode="replicate")
    moved = wide.roll((3, -2), (2, 3))
    inner = (..., slice(8, -8), slice(8, -8))
    torch.testing.assert_close(
        style_log_odds(moved, LIBRARY)[inner], style_log_odds(wide, LIBRARY).roll((3, -2), (2, 3))[inner]
    )


def test_the_order_of_the_set_does_not_matter() -> None:
    order = torch.randperm(len(LATENTS), generator=torch.Generator().manual_seed(2))
    shuffled = build_style_library(LATENTS[order], REGIONS[order])
    torch.testing.assert_close(style_log_odds(STYLED, shuffled), style_log_odds(STYLED, LIBRARY))
    torch.testing.assert_close(correct(STYLED, library=shuffled), correct(STYLED))


def test_identities() -> None:
    assert torch.equal(correct(STYLED, replace(CONFIG, strength=0.0)), STYLED)
    assert torch.equal(correct(STYLED, replace(CONFIG, threshold=50.0)), STYLED)
    assert torch.equal(correct(STYLED, mask=torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)), STYLED)
    assert torch.equal(correct(FLAT), FLAT)


def test_a_mask_limits_where_the_method_searches_and_acts() -> None:
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)
    mask[..., :2, :] = 1
    assert torch.equal(correct(STYLED, mask=mask), STYLED)
    mask[..., :12, :] = 1
    corrected = correct(STYLED, mask=mask)
    assert torch.equal(corrected[..., 12:, :], STYLED[..., 12:, :]) and not torch.equal(corrected, STYLED)


def test_a_found_area_stays() -> None:
    _, found = style_correction(STYLED, STYLED, LIBRARY, CONFIG, StyledArea.none(STYLED))
    result, later = style_correction(FLAT, FLAT, LIBRARY, CONFIG, found)
    assert torch.equal(later.area, found.area) and result.gate.tolist() == [1]


def test_batch_equals_single_calls() -> None:
    batch = torch.cat([STYLED, FLAT, make_image(103, True)])
    torch.testing.assert_close(correct(batch), torch.cat([correct(x[None]) for x in batch]))
    assert torch.equal(correct(batch)[1], batch[1])


def test_a_style_that_equals_the_neutral_images_opens_no_gate_on_them() -> None:
    alike = build_style_library(LATENTS[4:], REGIONS[[0] * 6 + [-1] * 6])
    torch.testing.assert_close(alike.typical, alike.neutral_highest + LEAST_LEAD)
    assert torch.equal(
        correct(LATENTS[-1:], library=alike, config=replace(CONFIG, threshold=1.0)), LATENTS[-1:]
    )


def test_one_image_of_each_class_and_images_without_contrast_give_finite_results() -> None:
    for latents in (LATENTS[[0, -1]], torch.zeros(2, 3, SIDE, SIDE)):
        library = build_style_library(latents, REGIONS[[0, -1]])
        for x in (STYLED.to(latents.dtype), torch.zeros(1, 3, SIDE, SIDE, dtype=latents.dtype)):
            assert bool(torch.isfinite(correct(x, library=library)).all())


def test_large_latents_are_described_by_some_of_their_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = style_log_odds(STYLED, LIBRARY).amax()
    monkeypatch.setattr(style_posterior, "MOST_WINDOWS", SIDE * SIDE // 4)
    some = build_style_library(LATENTS, REGIONS)
    assert not torch.equal(some.neutral_precision, LIBRARY.neutral_precision)
    assert (style_log_odds(STYLED, some).amax() - some.neutral_highest) > 0.5 * (
        whole - LIBRARY.neutral_highest
    )
