"""Two-class density of embeddings: closed forms, a second derivation, calibration."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_guidance.guidance.safety_functions.embedding_density import (
    CONCENTRATIONS,
    ONE_CLASS_SHARE,
    calibrate,
    leave_one_out_density,
    log_density,
    log_normalisation,
)
from safe_guidance.guidance.safety_functions.negation_set import NegationSetSafetyFunction


def around(direction: int, count: int, seed: int, width: int = 32, spread: float = 0.15) -> torch.Tensor:
    """Draw unit vectors around a coordinate axis."""
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spread
    noise[:, direction] += 1
    return F.normalize(noise, dim=1)


def test_log_density_equals_a_loop_in_double_precision() -> None:
    points, references = around(0, 5, 1).double(), around(1, 7, 2).double()
    expected = [
        math.log(sum(math.exp(9.0 * (float(p @ r) - 1)) for r in references) / len(references))
        for p in points
    ]
    # Double precision rounds each of the seven terms by 1e-16 of its size.
    assert log_density(points, references, 9.0).tolist() == pytest.approx(expected, abs=1e-12)


def test_leave_one_out_density_equals_the_density_of_the_others() -> None:
    references = around(0, 6, 3).double()
    for index, value in enumerate(leave_one_out_density(references, 20.0)):
        others = torch.cat([references[:index], references[index + 1 :]])
        expected = log_density(references[index : index + 1], others, 20.0)
        assert float(value) == pytest.approx(float(expected), abs=1e-12)


def test_normalisation_integrates_to_one_in_three_dimensions() -> None:
    # In three dimensions the constant is kappa / (4 pi sinh kappa).
    for kappa in (4.0, 16.0, 64.0):
        exact = (
            math.log(kappa)
            - math.log(4 * math.pi)
            - (kappa + math.log1p(-math.exp(-2 * kappa)) - math.log(2))
        )
        # The expansion is made for large orders; at order 1/2 its first neglected term is 1 / (8 kappa).
        assert log_normalisation(kappa, 3) == pytest.approx(exact, abs=1 / (4 * kappa))


def test_two_separate_classes_are_told_apart() -> None:
    density = calibrate(around(0, 40, 1), around(1, 40, 2), false_alarms=0.05)
    assert density.check.found == 40
    assert density.check.false_alarms <= 2
    assert bool((density.log_odds(around(0, 50, 3)) > density.threshold).all())
    assert int((density.log_odds(around(1, 200, 4)) > density.threshold).sum()) <= 0.1 * 200


def test_classes_that_are_the_same_give_the_share_of_false_alarms_that_was_asked_for() -> None:
    density = calibrate(around(0, 60, 1), around(0, 199, 2), false_alarms=0.1)
    share = float((density.log_odds(around(0, 4000, 3)) > density.threshold).float().mean())
    # A conformal quantile of 199 images has a standard deviation of sqrt(.1 * .9 / 199) = .021.
    assert share == pytest.approx(0.1, abs=3 * 0.022)


@given(st.floats(0.0, 1.0), st.integers(4, 30), st.integers(4, 30), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_neutral_images_are_never_more_often_above_the_threshold_than_asked(
    false_alarms: float, unwanted: int, neutral: int, seed: int
) -> None:
    density = calibrate(around(0, unwanted, seed), around(1, neutral, seed + 1, spread=0.5), false_alarms)
    assert density.check.false_alarms <= false_alarms * neutral + 1e-9
    assert density.concentration in CONCENTRATIONS


def test_without_neutral_images_the_threshold_keeps_most_of_the_set() -> None:
    density = calibrate(around(0, 50, 1), None, false_alarms=0.02)
    assert density.check.found == ONE_CLASS_SHARE * 50
    assert not bool((density.log_odds(around(1, 50, 2)) > density.threshold).any())


def test_order_and_scale_of_the_score() -> None:
    class Axes:
        name, networks = "axes", ()

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return F.normalize(images.flatten(1), dim=1)

    unwanted, neutral = around(0, 20, 1, width=27), around(1, 20, 2, width=27)
    function = NegationSetSafetyFunction(Axes(), calibrate(unwanted, neutral, 0.05))
    images = torch.stack([unwanted[0], neutral[0]]).view(2, 3, 3, 3).requires_grad_(True)
    found = function(images)
    assert found.gate.tolist() == [True, False]
    assert found.score[1] == 0 < found.score[0] < 2
    found.score.sum().backward()
    assert float(images.grad[0].abs().sum()) > 0
    assert float(images.grad[1].abs().sum()) == 0


@pytest.mark.parametrize("unwanted, neutral", [(3, 8), (8, 3)])
def test_too_few_images_are_refused_with_their_number(unwanted: int, neutral: int) -> None:
    with pytest.raises(ValueError, match="has 3 (unwanted|neutral) images, and 4 are needed"):
        calibrate(around(0, unwanted, 1), around(1, neutral, 2), 0.05)


def test_values_that_are_not_numbers_are_refused() -> None:
    broken = around(0, 8, 1)
    broken[2, 3] = math.nan
    with pytest.raises(ValueError, match="not numbers"):
        calibrate(broken, around(1, 8, 2), 0.05)
