"""Changes of several methods on one prediction: sums, caps, masks, unchanged samples, and the clock of
their state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_guidance.guidance.core.composition import Change, SigmaClock, capped, combine
from safe_guidance.guidance.core.noise_level import NoiseLevel, SigmaWindow

ALL = torch.ones(3, dtype=torch.bool)


def tensor(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(seed))


def test_nothing_to_do_returns_the_same_tensor() -> None:
    denoised = tensor(0)
    assert combine(denoised, []) is denoised
    assert combine(denoised, [Change(tensor(1), ~ALL, 1.0)]) is denoised


def test_one_change_is_added_as_it_is() -> None:
    denoised, delta = tensor(0), 0.1 * tensor(1)
    assert torch.equal(combine(denoised, [Change(delta, ALL, 0.5)]), denoised + delta)


@given(st.permutations(range(4)), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_order_does_not_matter_to_the_last_bit(order: list[int], seed: int) -> None:
    denoised = tensor(seed)
    scales = (1e-3, 1.0, 1e-6, 0.3)
    changes = [
        Change(scale * tensor(seed + i + 1), torch.arange(3) != i, 0.5) for i, scale in enumerate(scales)
    ]
    assert torch.equal(combine(denoised, changes), combine(denoised, [changes[i] for i in order]))


def test_inactive_samples_are_copied_bit_by_bit() -> None:
    denoised = torch.full((3, 1, 2, 2), -0.0)
    active = torch.tensor([True, False, False])
    result = combine(
        denoised,
        [Change(torch.ones_like(denoised), active, 1.0), Change(torch.zeros_like(denoised), active, 1.0)],
    )
    assert torch.signbit(result[1:]).all() and not torch.signbit(result[0]).any()


def test_joint_cap_is_the_largest_of_the_methods() -> None:
    denoised, delta = tensor(0), tensor(1)
    together = combine(denoised, [Change(delta, ALL, 0.2), Change(delta, ALL, 0.3)]) - denoised
    share = together.flatten(1).norm(dim=1) / denoised.flatten(1).norm(dim=1)
    torch.testing.assert_close(share, torch.full((3,), 0.3), atol=1e-5, rtol=0)


def test_cap_leaves_small_changes_alone() -> None:
    denoised = tensor(0)
    assert torch.equal(capped(0.01 * denoised, denoised, 0.5), 0.01 * denoised)
    assert capped(torch.zeros_like(denoised), denoised, 0.5).abs().max() == 0


def test_mask_limits_where_changes_act() -> None:
    denoised, mask = tensor(0), torch.zeros(1, 1, 5, 6)
    mask[..., :2] = 1
    result = combine(denoised, [Change(torch.ones_like(denoised), ALL, 10.0)], mask)
    assert torch.equal(result[..., 2:], denoised[..., 2:]) and torch.equal(
        result[..., :2], denoised[..., :2] + 1
    )


def test_half_precision_stays_half_precision() -> None:
    denoised = tensor(0).half()
    assert combine(denoised, [Change(tensor(1), ALL, 0.5)]).dtype == torch.float16


def new_times(*steps: Sequence[float]) -> list[float]:
    """Return the evaluations that are new; a sampler reports each of `steps` after its first evaluation."""
    clock, found = SigmaClock(), []
    for first, *others in steps:
        found += [first] if clock.advance(first) else []
        clock.end_step()
        found += [sigma for sigma in others if clock.advance(sigma)]
    return found


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([[10], [5], [2]], [10, 5, 2]),
        ([[10, 5], [5, 2], [2]], [10, 5, 2]),  # heun
        ([[10, 5, 2], [5, 2, 1], [2, 1], [1]], [10, 5, 2, 1]),  # heunpp2
        ([[1, 5, 10], [5, 10, 20], [10, 20], [20]], [1, 5, 10, 20]),  # the same upwards
        ([[10, 7], [5, 3], [2]], [10, 7, 5, 3, 2]),  # dpmpp_2s
        ([[10, 3], [5, 1], [2]], [10, 3, 5, 1, 2]),  # dpmpp_2s_ancestral, which adds noise after a step
        ([[10, 5 * (1 - 1e-7)], [5, 2], [2]], [10, 5 * (1 - 1e-7), 2]),  # a level computed anew
        ([[10], [5], [2], [5], [2], [5], [2]], [10, 5, 2, 5, 2, 5, 2]),  # restarts
        ([[10, 5], [5, 2], [2, 1], [10, 5], [5, 2], [2]], [10, 5, 2, 1, 10, 5, 2]),  # restarts of heun
        ([[0.1], [1], [5]], [0.1, 1, 5]),  # un-sampling
    ],
)
def test_the_clock_goes_by_the_order_of_evaluations(steps: list[list[float]], expected: list[float]) -> None:
    assert new_times(*steps) == expected


def test_the_clock_of_a_sampler_without_reports_goes_by_its_levels() -> None:
    clock = SigmaClock()
    assert [clock.advance(s) for s in (10.0, 5.0, 5.0, 2.0, 2.0, 1.0)] == [
        True,
        True,
        False,
        True,
        False,
        True,
    ]


@given(st.floats(1e-3, 1e3), st.floats(0, 1))
def test_windows_contain_their_bounds(sigma: float, share: float) -> None:
    window = SigmaWindow(high=sigma, low=sigma * share)
    assert NoiseLevel.variance_exploding(sigma) in window
    assert NoiseLevel.variance_exploding(window.low) in window
    assert NoiseLevel.variance_exploding(sigma * 1.01) not in window


def test_levels_of_both_families_agree() -> None:
    flow, pure_noise = NoiseLevel(1 - 0.824, 0.824), NoiseLevel(0.0, 1.0)
    assert flow.sigma == pytest.approx(4.68, abs=0.01)
    assert pure_noise.sigma == math.inf
    with pytest.raises(ValueError, match="Make its start larger"):
        SigmaWindow(high=1.0, low=2.0)
    assert pure_noise in SigmaWindow()
    assert pure_noise not in SigmaWindow(high=9)


def test_changes_without_a_cap_neither_limit_nor_are_limited() -> None:
    denoised = tensor(0)
    pushes = [Change(tensor(1), ALL, 0.1), Change(tensor(2), ALL, 0.2)]
    free = Change(50 * tensor(3), ALL)
    together, bounded = combine(denoised, [*pushes, free]), combine(denoised, pushes)
    torch.testing.assert_close(together, bounded + free.delta)
