"""Statistics of a negation set: similarity of its images, near-duplicates."""

from __future__ import annotations

import math

import pytest
import torch

from safe_guidance.formats.negation_set import combined, from_images, without_duplicates
from safe_guidance.guidance.core.references import References
from safe_guidance.guidance.safe_denoiser.similarity import closest
from safe_guidance.reports.contact_sheet import CELL, GAP, comparison_sheet
from safe_guidance.reports.set_statistics import set_statistics, thumbnail, thumbnails


def make_images(count: int, seed: int = 0, height: int = 64) -> torch.Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, 64), mode="bilinear").movedim(1, -1)


def test_near_duplicates_are_found() -> None:
    images = make_images(20)
    # Brighter, with less contrast: still the same image.
    images = torch.cat([images, 0.8 * images[4:5] + 0.1])
    found = set_statistics(thumbnails(from_images(images)), 0.1)
    assert (found.compared, found.near_duplicates) == (21, 1)
    value, first, second = found.closest[0]
    assert (first, second) == (4, 20) and value > 0.99
    assert [pair[0] for pair in found.closest] == sorted((pair[0] for pair in found.closest), reverse=True)


def test_figures_against_loops() -> None:
    z = thumbnails(from_images(make_images(6))).read(slice(None)).double()
    centred = (z - z.mean((2, 3), keepdim=True)).flatten(1)
    among = torch.nn.functional.cosine_similarity(centred[:, None], centred[None], dim=2)
    found = set_statistics(References(z), 0.1)
    pairs = [among[i, j].item() for i in range(6) for j in range(i)]
    assert found.mean_similarity == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)
    softened = [
        0.1 * math.log(sum(math.exp(among[i, j].item() / 0.1) for j in range(6) if j != i) / 5)
        for i in range(6)
    ]
    assert found.typical == pytest.approx(sorted(softened)[2], abs=1e-9)


def test_an_image_of_any_size_finds_itself() -> None:
    negation_set = from_images(make_images(12, height=96))
    image = make_images(12, height=96)[7]
    values, places = closest(thumbnail(image)[None], thumbnails(negation_set), 2)
    assert places[0, 0] == 7 and values[0, 0] > 0.999


def test_combined_sets_keep_order_masks_and_origin() -> None:
    masked = from_images(make_images(2, 1), torch.ones(1, 64, 64), "a", "garden", "CC0")
    plain = from_images(make_images(3, 2), None, "b", "street", "CC0")
    whole = combined([masked, plain, masked])
    assert len(whole) == 7 and [mask is None for mask in whole.masks] == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    assert (whole.name, whole.source, whole.licence) == ("a; b", "garden; street", "CC0")
    assert len(without_duplicates(whole)) == 5
    assert combined([plain], "mine").name == "mine"


def test_comparison_sheet() -> None:
    black, white = torch.zeros(1, 32, 32, 3), torch.ones(2, 32, 32, 3)
    sheet = comparison_sheet(black, from_images(white), torch.tensor([[1, 0]]))
    assert sheet.shape == (CELL + 2 * GAP, 3 * (CELL + GAP) + GAP, 3)
    middle = GAP + CELL // 2
    assert sheet[middle, middle].max() == 0 and sheet[middle, middle + CELL + GAP].min() > 0.99
