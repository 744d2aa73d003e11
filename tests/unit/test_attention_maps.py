"""Detection maps: probabilities, the two normalisations, and a second derivation with plain loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_guidance.guidance.detect_and_guide import attention_maps as cam

EXAMPLE = torch.tensor([[0.02, 0.05, 0.30], [0.10, 0.55, 0.62], [0.02, 0.03, 0.04]])[None, None]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_token_probabilities_are_those_of_every_position_and_head_alone() -> None:
    queries, keys = random(2, 3, 12, 5), random(3, 4, 5, seed=1)
    maps = cam.token_probabilities(cam.Queries(queries, (3, 4)), keys)
    assert maps.shape == (2, 4, 3, 4) and maps.dtype == torch.float32
    for row in range(2):
        for position in range(12):
            expected = torch.zeros(4, dtype=torch.float64)
            for head in range(3):
                scores = [
                    float(queries[row, head, position].double() @ keys[head, t].double()) / math.sqrt(5)
                    for t in range(4)
                ]
                total = sum(math.exp(s) for s in scores)
                expected += torch.tensor([math.exp(s) / total / 3 for s in scores], dtype=torch.float64)
            torch.testing.assert_close(
                maps[row, :, position // 4, position % 4].double(), expected, atol=1e-6, rtol=1e-6
            )


def test_maps_are_probabilities_whatever_the_precision_and_sizes() -> None:
    layers = [
        cam.token_probabilities(
            cam.Queries(random(2, 4, h * w, 8, seed=h).half(), (h, w)), random(4, 3, 8, seed=w).half()
        )
        for h, w in ((8, 12), (4, 6), (5, 7))
    ]
    maps = cam.average_over_layers(layers, (16, 24))
    assert maps.shape == (2, 3, 16, 24)
    assert maps.min() >= 0 and maps.max() <= 1
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 16, 24))


def test_averaging_layers_resizes_without_aligning_corners() -> None:
    small, large = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 8, 8)
    expected = (F.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False) + large) / 2
    torch.testing.assert_close(cam.average_over_layers([small, large], (8, 8)), expected)


def test_heads_are_split_as_the_attention_splits_them() -> None:
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    assert torch.equal(cam.split_heads(x, 2), x.view(2, 3, 2, 4).transpose(1, 2))


def test_against_background_is_a_two_way_softmax() -> None:
    scores = random(2, 3, 4, 4)
    p = cam.against_background(scores.softmax(1))
    torch.testing.assert_close(p, torch.sigmoid(scores[:, 1:] - scores[:, :1]))
    assert torch.equal(cam.against_background(torch.zeros(1, 2, 2, 2)), torch.zeros(1, 1, 2, 2))


def test_joint_normalisation_examples() -> None:
    normalised = cam.normalize_jointly(EXAMPLE)
    assert normalised.max().item() == pytest.approx(0.625)
    assert normalised[0, 0, 1, 1].item() == pytest.approx(0.552, abs=5e-4)
    faint = torch.tensor([[0.02, 0.20]])[None, None]
    assert cam.normalize_jointly(faint).max().item() == pytest.approx(0.1875)
    assert cam.normalize_per_map(faint).max().item() == 1.0


def test_a_map_that_says_nothing_becomes_zero() -> None:
    half = torch.full((1, 1, 3, 3), 0.5)
    assert torch.equal(cam.normalize_jointly(half), torch.zeros_like(half))
    assert torch.equal(cam.normalize_per_map(half), torch.zeros_like(half))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), low=st.floats(0, 1), high=st.floats(0, 1))
def test_joint_normalisation_keeps_one_half_in_place(seed: int, low: float, high: float) -> None:
    p = low + (high - low) * torch.rand(
        3, 2, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    normalised = cam.normalize_jointly(p)
    assert normalised.min() >= 0 and normalised.max() <= 1
    clear = ((p - 0.5).abs() > 1e-9) & ((p - 0.5).abs().amax((-2, -1), keepdim=True) > 1e-3)
    assert torch.equal((normalised >= 0.5)[clear], (p >= 0.5)[clear])


def test_several_concepts_take_the_strongest() -> None:
    a, b = torch.rand(2, 1, 3, 3), torch.rand(2, 1, 3, 3)
    assert torch.equal(cam.several_concepts([a, b]), torch.maximum(a, b))
    assert torch.equal(cam.several_concepts([a]), a)


def test_the_mean_over_tokens_is_taken_before_normalising() -> None:
    maps = random(2, 4, 5, 5).softmax(1)
    torch.testing.assert_close(
        cam.concept_probability(maps), cam.against_background(maps).mean(1, keepdim=True)
    )
