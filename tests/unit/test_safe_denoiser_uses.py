"""Automatic settings of Safe Denoiser: the use that a set's masks say, its values, and their words."""

from __future__ import annotations

import pytest
import torch

from safe_guidance.guidance.core.noise_level import NoiseLevel, SigmaWindow
from safe_guidance.guidance.core.references import References
from safe_guidance.guidance.safe_denoiser.choice import choose_comparison
from safe_guidance.guidance.safe_denoiser.interface import Predictions
from safe_guidance.guidance.safe_denoiser.local import LocalComparison
from safe_guidance.guidance.safe_denoiser.settings import AUTOMATIC, Mode, SafeDenoiserSettings, Use
from safe_guidance.guidance.safe_denoiser.style import StyleComparison
from safe_guidance.guidance.safe_denoiser.uses import (
    NAMES,
    NEAR_COPIES,
    PUBLISHED,
    STYLE,
    SUBJECT,
    VALUES,
    MaskCounts,
    automatic_in_words,
    automatic_values,
)
from safe_guidance.guidance.safe_denoiser.whole_image import WholeImageComparison

WHOLE, NONE = torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
PART = NONE.clone()
PART[..., 3:8, 3:8] = 1


@pytest.mark.parametrize(
    ("masks", "use", "counts"),
    [
        ([None, None], NEAR_COPIES, (0, 2, 0)),
        ([WHOLE, WHOLE], NEAR_COPIES, (0, 2, 0)),
        ([PART, NONE, None], SUBJECT, (1, 1, 1)),
        ([PART], SUBJECT, (1, 0, 0)),
        ([WHOLE, NONE, None], STYLE, (0, 2, 1)),
    ],
)
def test_masks_say_what_a_set_is_used_for(
    masks: list[torch.Tensor | None], use: Use, counts: tuple[int, int, int]
) -> None:
    found = MaskCounts.of(None if m is None else m > 0.5 for m in masks)
    assert (found.marked, found.whole, found.neutral) == counts
    assert found.use == found.chosen(AUTOMATIC) == found.chosen(use) == use
    regions = torch.cat([WHOLE if m is None else m for m in masks])
    assert MaskCounts.of_regions(regions) == found
    assert MaskCounts.of_regions(None, 5) == MaskCounts(0, 5, 0)


@pytest.mark.parametrize("counts", [MaskCounts(0, 4, 0), MaskCounts(0, 0, 4), MaskCounts(4, 0, 4)])
def test_a_named_use_that_the_set_does_not_allow_is_refused(counts: MaskCounts) -> None:
    with pytest.raises(ValueError, match="needs images of the style .* set use to automatic"):
        counts.chosen(STYLE)
    if not counts.marked:
        with pytest.raises(ValueError, match="needs masks .* Paint masks"):
            counts.chosen(SUBJECT)


def test_few_masked_images_get_a_higher_threshold() -> None:
    few, many = (automatic_values(MaskCounts(n, 0, 0), AUTOMATIC, "calibrated") for n in (59, 60))
    assert (few.threshold, many.threshold) == (1.0, 0.7)
    assert few.strength == many.strength == 1.2


@pytest.mark.parametrize("mode", ["exact", "tempered", "official"])
def test_the_published_modes_keep_the_papers_values(mode: Mode) -> None:
    assert automatic_values(MaskCounts(90, 0, 0), AUTOMATIC, mode) == PUBLISHED
    paper = SafeDenoiserSettings()
    for name in ("strength", "threshold", "temperature", "cap"):
        assert getattr(PUBLISHED, name) == getattr(paper, name)


def test_every_use_has_values_from_the_first_image_on() -> None:
    for rows in VALUES.values():
        leasts = [least for least, _ in rows]
        assert leasts == sorted(leasts, reverse=True) and leasts[-1] == 1
        for _, values in rows:
            assert 0 <= values.start_sigma < values.end_sigma <= 1


def test_the_use_chooses_the_comparison() -> None:
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    marked = References(latents, torch.cat([PART, PART, WHOLE, NONE]))
    assert isinstance(choose_comparison(marked, SafeDenoiserSettings()), LocalComparison)
    assert isinstance(choose_comparison(marked, SafeDenoiserSettings(use=STYLE)), StyleComparison)
    with pytest.raises(ValueError, match="needs masks"):
        choose_comparison(References(latents), SafeDenoiserSettings(use=SUBJECT))


def test_near_copies_ignore_masks_and_keep_away_from_no_neutral_image() -> None:
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = SafeDenoiserSettings(use=NEAR_COPIES, threshold=1.0, strength=1.0)
    comparison = choose_comparison(References(latents, torch.cat([PART, PART, WHOLE, NONE])), settings)
    assert isinstance(comparison, WholeImageComparison) and len(comparison.references) == 3
    comparison.place(torch.device("cpu"), lambda references, _: references, None)
    result = comparison.correct(Predictions(latents, latents, latents, NoiseLevel.variance_exploding(5.0)))
    assert bool((result.similarity[:3] > 0.8).all()) and float(result.similarity[3]) < 0.3


def test_words_name_what_was_found_and_nothing_that_was_set() -> None:
    counts = MaskCounts(64, 0, 0)
    by_hand = SafeDenoiserSettings()
    assert automatic_in_words(counts, by_hand) == ""
    found = SafeDenoiserSettings(
        threshold=0.7, window=SigmaWindow(low=0.15), automatic=("start_sigma", "end_sigma", "threshold")
    )
    assert automatic_in_words(counts, found) == (
        "Automatic: a subject anywhere; from the first step, to sigma 0.15, threshold 0.7."
    )
    assert automatic_in_words(counts, SafeDenoiserSettings(mode="exact", automatic=NAMES)).startswith(
        "Automatic: mode exact; strength 0.33, from the first step, to sigma 4.67"
    )
