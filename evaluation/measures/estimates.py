"""Shares with their uncertainty, and ratios of paired measurements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist, median


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share, within [0, 1].

    Unlike the normal approximation, it has a useful width at 0 and at `total`.

    Raises:
        ValueError: when `total` is not positive, `successes` is outside [0, total] or `confidence` outside
            (0, 1).
    """
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(
            f"{successes} of {total} is not a share. "
            "Count at least one case, and no more successes than cases."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"A confidence of {confidence} is outside (0, 1). Give a fraction such as 0.95.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = successes / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    margin = z * (share * (1 - share) / total + weight / (4 * total)) ** 0.5 / (1 + weight)
    return max(0.0, min(centre - margin, share)), min(1.0, max(centre + margin, share))


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over pairs of numerator / denominator, which single slow runs do not change.

    Raises:
        ValueError: when the sequences are empty or differ in length, or a denominator is not positive.
    """
    if len(numerators) != len(denominators) or not denominators:
        raise ValueError(
            f"{len(numerators)} and {len(denominators)} measurements make no pairs. "
            "Measure both on the same cases."
        )
    if min(denominators) <= 0:
        raise ValueError("A measurement to compare with is not positive. Measure it again.")
    return median(a / b for a, b in zip(numerators, denominators))
