"""Intervals and ratios against known values and closed forms."""

from __future__ import annotations

from statistics import NormalDist

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safe_guidance.evaluation.measures.estimates import median_ratio, wilson_interval

# Timings say nothing about this code on a busy machine.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
Z = NormalDist().inv_cdf(0.975)
SHARES = st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I: the score method without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_has_the_published_values(
    successes: int, total: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("total", [1, 32, 200])
def test_wilson_interval_at_the_ends_has_its_closed_form(total: int) -> None:
    edge = Z * Z / (total + Z * Z)
    assert wilson_interval(0, total) == (0.0, pytest.approx(edge))
    assert wilson_interval(total, total) == (pytest.approx(1 - edge), 1.0)


@PATIENT
@given(SHARES)
def test_wilson_interval_contains_the_share_and_is_symmetric_in_the_counting(share: tuple[int, int]) -> None:
    successes, total = share
    low, high = wilson_interval(successes, total)
    assert 0 <= low <= successes / total <= high <= 1
    assert wilson_interval(total - successes, total) == pytest.approx((1 - high, 1 - low))


@PATIENT
@given(SHARES)
def test_wilson_limits_solve_the_score_equation(share: tuple[int, int]) -> None:
    successes, total = share
    for limit in wilson_interval(successes, total):
        distance = (successes / total - limit) ** 2
        assert distance == pytest.approx(Z * Z * limit * (1 - limit) / total, abs=1e-9) or limit in (0, 1)


def test_more_confidence_is_wider() -> None:
    low, high = wilson_interval(5, 32)
    wider_low, wider_high = wilson_interval(5, 32, confidence=0.99)
    assert wider_low < low < high < wider_high


@pytest.mark.parametrize(
    ("successes", "total", "confidence"),
    [(1, 0, 0.95), (-1, 3, 0.95), (4, 3, 0.95), (1, 3, 1.0), (1, 3, 0.0)],
)
def test_wilson_interval_rejects_invalid_input(successes: int, total: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"\. "):
        wilson_interval(successes, total, confidence)


def test_median_ratio_is_paired_and_robust_to_one_outlier() -> None:
    # The medians of the two columns have the ratio 2, but the pairs' ratios are 1, 2, 4 and one outlier.
    assert median_ratio([1.0, 2.0, 4.0, 900.0], [1.0, 1.0, 1.0, 1.0]) == 3.0
    assert median_ratio([10.0, 1.0, 3.0], [5.0, 1.0, 1.0]) == 2.0


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_median_ratio_rejects_unpaired_input(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"\. "):
        median_ratio(a, b)
