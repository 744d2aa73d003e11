"""Masked sets of any size, with masks of any share of the image: a finite answer or a clear error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safe_guidance.guidance.core.noise_level import NoiseLevel
from safe_guidance.guidance.core.references import References
from safe_guidance.guidance.safe_denoiser.choice import choose_comparison
from safe_guidance.guidance.safe_denoiser.interface import Comparison, Predictions
from safe_guidance.guidance.safe_denoiser.local import LocalComparison
from safe_guidance.guidance.safe_denoiser.patch_posterior import MOST_IMAGES, build_patch_library
from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserSettings

SETTINGS = SafeDenoiserSettings(strength=1.0, threshold=0.7, cap=2.0)
CLEAR = "too small|nothing neutral|Nothing is marked"
"""Words of the errors that a set may raise."""


def latents_of(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(seed))


def centred_mask(height: int, width: int, share: float) -> Tensor:
    """Return a mask (1, 1, height, width) in the middle, of this share of both sides."""
    mask = torch.zeros(1, 1, height, width)
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top, left = (height - rows) // 2, (width - columns) // 2
    mask[..., top : top + rows, left : left + columns] = 1
    return mask


def corrected(comparison: Comparison, x: Tensor) -> Tensor:
    """Return the change of a prediction, after checks that the answer is one."""
    comparison.place(torch.device("cpu"), lambda references, _: references, None)
    result = comparison.correct(Predictions(x, x, x, NoiseLevel.variance_exploding(4.0)))
    assert bool(result.delta.isfinite().all()) and bool(result.gate.isfinite().all())
    # With a threshold that is not a number the gate would never open.
    assert bool(result.threshold.isfinite().all())
    return result.delta


shares = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.02, 0.98))


@given(
    height=st.integers(1, 28),
    width=st.integers(1, 28),
    shares=st.lists(shares, min_size=1, max_size=5),
    flat=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_every_size_and_mask_has_an_answer_or_a_clear_error(
    height: int, width: int, shares: list[float], flat: bool, seed: int
) -> None:
    latents = latents_of(len(shares), height, width, seed) * (0 if flat else 1)
    regions = torch.cat(
        [centred_mask(height, width, s) if s else torch.zeros(1, 1, height, width) for s in shares]
    )
    try:
        comparison = choose_comparison(References(latents, regions), SETTINGS)
    except ValueError as error:
        assert any(words in str(error) for words in CLEAR.split("|")), error
        return
    corrected(comparison, latents[:1] + 0.1 * latents_of(1, height, width, 1))


@pytest.mark.parametrize("share", [0.8, 0.85, 0.9])
@pytest.mark.parametrize("side", [12, 16, 20, 24, 28])
def test_masks_of_nearly_the_whole_image_with_a_neutral_one(side: int, share: float) -> None:
    latents = latents_of(4, side, side)
    regions = torch.cat([centred_mask(side, side, share)] * 3 + [torch.zeros(1, 1, side, side)])
    comparison = choose_comparison(References(latents, regions), SETTINGS)
    assert isinstance(comparison, LocalComparison)
    assert bool(corrected(comparison, latents[:1]).any()), "an image of the set itself is found"


def test_masks_without_any_neutral_window_say_what_is_missing() -> None:
    regions = torch.cat([centred_mask(12, 12, 0.9)] * 3)
    with pytest.raises(ValueError, match=r"nothing neutral\. Paint smaller masks, or add images"):
        build_patch_library(latents_of(3, 12, 12), regions, 0.1)


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 8])
def test_images_with_few_neutral_windows(windows: int) -> None:
    """The neutral windows are those of a strip that a tall mask leaves at the bottom."""
    regions = torch.ones(3, 1, 24, 8)
    regions[:, :, 22:, :windows] = 0
    regions = torch.cat([regions, torch.zeros(1, 1, 24, 8)])
    latents = latents_of(4, 24, 8)
    corrected(choose_comparison(References(latents, regions), SETTINGS), latents[:1])


def test_latents_of_one_pixel_are_too_small() -> None:
    with pytest.raises(ValueError, match="at least 2 latent pixels a side"):
        build_patch_library(latents_of(1, 1, 9), centred_mask(1, 9, 0.3), 0.1)


def test_masks_that_vanish_at_this_size_are_not_taken_for_whole_images() -> None:
    faint = 0.3 * centred_mask(16, 16, 0.1)
    with pytest.raises(ValueError, match="too small at this size"):
        choose_comparison(References(latents_of(1, 16, 16), faint), SETTINGS)
    with pytest.raises(ValueError, match="Nothing is marked as unwanted"):
        choose_comparison(References(latents_of(1, 16, 16), torch.zeros_like(faint)), SETTINGS)


def test_a_few_masked_images_among_many_neutral_ones_are_used() -> None:
    count = MOST_IMAGES + 100
    regions = torch.zeros(count, 1, 4, 4)
    for marked in (1, 3):
        regions[marked, :, :2, :2] = 1
    library = build_patch_library(latents_of(count, 4, 4), regions, 0.1)
    assert len(library.unwanted) == 2 and len(library.latents) == MOST_IMAGES
