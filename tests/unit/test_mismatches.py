"""Settings of Safe Denoiser that do not fit the masks are named, and those of the workflows are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.safe_denoiser.mismatches import FEWEST_MASKED, mismatches
from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserSettings

WHOLE = SafeDenoiserSettings()
MASKED = SafeDenoiserSettings(strength=1.2, threshold=0.7, cap=2.0, window=SigmaWindow(low=0.15))
STYLE = SafeDenoiserSettings(strength=1.0, threshold=0.2, cap=2.0, window=SigmaWindow(high=1.5))


def regions(marked: int, whole: int = 0, neutral: int = 0, faint: int = 0) -> Tensor:
    """Masks of so many images of each kind, (N, 1, 8, 8)."""
    part = torch.zeros(1, 1, 8, 8)
    part[..., 2:5, 2:5] = 1
    kinds = [part] * marked + [torch.ones_like(part)] * whole + [0 * part] * neutral + [0.3 * part] * faint
    return torch.cat(kinds)


@pytest.mark.parametrize(
    ("masks", "settings"),
    [
        (None, WHOLE),
        (regions(0, whole=3), WHOLE),
        (regions(FEWEST_MASKED, neutral=5), MASKED),
        (regions(0, whole=4, neutral=12), STYLE),
        (None, replace(WHOLE, mode="exact")),
    ],
)
def test_settings_that_fit_get_no_remark(masks: Tensor | None, settings: SafeDenoiserSettings) -> None:
    assert mismatches(masks, settings) == []


@pytest.mark.parametrize(
    ("masks", "settings", "words"),
    [
        (regions(90), WHOLE, "settings for whole images: end_sigma 4.67 stops too early, strength 0.33"),
        (regions(90), WHOLE, "Set end_sigma to 0.15, strength to 1, cap to 2 with masks."),
        (regions(90), replace(MASKED, window=SigmaWindow(low=1.2)), "end_sigma 1.2 stops too early"),
        (regions(90), replace(MASKED, cap=0.5), "cap 0.5 holds the change back. Set cap to 2"),
        (regions(59), MASKED, "has 59 masked images: with fewer than 60"),
        (regions(90, faint=2), MASKED, "masks of 2 images are too small at this size"),
        (regions(90, faint=1), MASKED, "mask of 1 image is too small"),
        (regions(0, whole=4, neutral=12), WHOLE, "settings for whole images"),
        (regions(0, whole=4, neutral=12), replace(STYLE, window=SigmaWindow()), "start_sigma to 1.5"),
        (regions(90), replace(MASKED, mode="exact"), "Mode exact ignores masks"),
        (regions(0, whole=4, neutral=1), replace(WHOLE, mode="official"), "Mode official ignores masks"),
        (None, replace(WHOLE, threshold=-0.1), "Threshold -0.1 lets the method act on every image"),
        (regions(90), replace(MASKED, threshold=0.0), "Threshold 0 lets"),
    ],
)
def test_every_mismatch_is_named_with_what_to_do(
    masks: Tensor | None, settings: SafeDenoiserSettings, words: str
) -> None:
    assert any(words in remark for remark in mismatches(masks, settings)), mismatches(masks, settings)
