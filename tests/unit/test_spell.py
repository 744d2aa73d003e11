"""Sparse Repellency: the published vectors, spheres, coinciding samples, masks, chunks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safe_guidance.guidance.core import references as streaming
from safe_guidance.guidance.core.references import References
from safe_guidance.guidance.spell import SpellSettings, repellency, with_unit_pixels

RAW = torch.tensor([[[3.0, 1], [4, 0]], [[0, 2], [1, 2]], [[-1, 1], [0, 1]]], dtype=torch.float64)[:, :, None]
QUERY = torch.tensor([[[1.0, 0.5]], [[0.25, -0.5]]], dtype=torch.float64)[None]
FREE = SpellSettings(overcompensation=1.0, cap=math.inf)


def config(r: float, like: Tensor, **changes: float) -> SpellSettings:
    """Make settings whose balls have the radius r."""
    return replace(FREE, radius=r / math.sqrt(like[0].numel()), **changes)


def latents(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("overcompensation", "expected"),
    [
        (1.0, (1.21157663, 0.23552921, -0.04091787, -0.76447079)),
        (1.6, (1.33852261, 0.07684674, -0.21546859, -0.92315326)),
    ],
)
def test_published_vectors(overcompensation: float, expected: tuple[float, ...]) -> None:
    result = repellency(
        QUERY, [with_unit_pixels(References(RAW))], config(1.5, QUERY, overcompensation=overcompensation)
    )
    torch.testing.assert_close(
        (QUERY + result.delta).flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0
    )
    assert result.inside.tolist() == [1]
    assert result.nearest.item() * math.sqrt(4) == pytest.approx(0.98107084, abs=1e-8)


def test_outside_every_ball_nothing_changes() -> None:
    result = repellency(QUERY, [with_unit_pixels(References(RAW))], config(0.5, QUERY))
    assert result.inside.tolist() == [0] and not bool(result.delta.any())


@given(st.floats(0.1, 5.0), st.floats(0.0, 3.0), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_lands_on_the_sphere_or_beyond(distance: float, overcompensation: float, seed: int) -> None:
    reference = latents(1, seed)
    direction = latents(1, seed + 1)
    x = reference + distance * direction / direction.norm()
    result = repellency(x, [References(reference)], config(3.0, x, overcompensation=overcompensation))
    expected = distance + overcompensation * max(0.0, 3.0 - distance)
    assert (x + result.delta - reference).norm().item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_prediction_that_equals_a_reference_leaves_it(scale: float) -> None:
    x = scale * latents(1, 3)
    result = repellency(x, [References(x.clone())], config(2.0, x))
    assert bool(torch.isfinite(result.delta).all())
    assert result.delta.norm().item() == pytest.approx(2.0, abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_identical_samples_are_pushed_apart(count: int) -> None:
    x = latents(1, 4).expand(count, -1, -1, -1).clone()
    result = repellency(x, [], config(2.0, x, among_batch=True))
    moved = (x + result.delta).flatten(1)
    apart = torch.cdist(moved, moved) + 10 * torch.eye(count)
    assert apart.min() > 1.9


def test_a_single_sample_has_nothing_to_leave() -> None:
    x = latents(1, 4)
    result = repellency(x, [], config(100.0, x, among_batch=True))
    assert (
        result.inside.tolist() == [0] and not bool(result.delta.any()) and result.nearest.item() == math.inf
    )


def test_samples_near_each_other_repel_each_other_alike() -> None:
    x = latents(1, 4) + 0.05 * latents(2, 5)
    result = repellency(x, [], config(3.0, x, among_batch=True))
    torch.testing.assert_close(result.delta[0], -result.delta[1])
    moved = x + result.delta
    before, after = (x[0] - x[1]).norm().item(), (moved[0] - moved[1]).norm().item()
    # Each goes the whole way from where the other was.
    assert after == pytest.approx(before + 2 * (3.0 - before))


def test_batch_and_chunks_equal_single_calls() -> None:
    x, references = latents(3, 6), References(latents(17, 7))
    close = config(16.0, x)
    together = repellency(x, [references], close)
    assert together.inside.max() > 1
    alone = torch.cat([repellency(x[i : i + 1], [references], close).delta for i in range(3)])
    torch.testing.assert_close(together.delta, alone)
    usual = streaming.CHUNK_ELEMENTS
    streaming.CHUNK_ELEMENTS = 3 * x[0].numel()
    try:
        torch.testing.assert_close(repellency(x, [references], close).delta, together.delta)
    finally:
        streaming.CHUNK_ELEMENTS = usual


def test_a_mask_limits_distances_and_changes() -> None:
    """Inside the mask the prediction equals the reference up to a known push; outside it does not matter."""
    reference = latents(1, 8)
    x = latents(1, 9)
    mask = torch.zeros(1, 1, 6, 5, dtype=torch.float64)
    mask[..., :2] = 1
    direction = mask * latents(1, 10)
    x = torch.where(mask > 0, reference + 0.5 * direction / direction.norm(), x)
    result = repellency(x, [References(reference)], replace(FREE, radius=0.2), mask)
    assert not bool((result.delta * (1 - mask)).any())
    reach = 0.2 * math.sqrt(4 * 6 * 2)
    assert (mask * (x + result.delta - reference)).norm().item() == pytest.approx(reach)
    nothing = repellency(x, [References(reference)], replace(FREE, radius=0.2), torch.zeros_like(mask))
    assert not bool(nothing.delta.any())


def test_the_cap_bounds_overlapping_balls() -> None:
    x = latents(2, 11)
    crowd = References(x[:1] + 0.01 * latents(50, 12))
    result = repellency(x, [crowd], config(5.0, x, cap=0.5))
    assert result.delta[0].norm() <= 0.5 * x[0].norm() * (1 + 1e-12)


@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.tuples(st.integers(1, 16), st.integers(1, 9), st.integers(1, 9)),
    st.floats(0.0, 3.0),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_moves_exactly_the_samples_that_are_inside(
    dtype, batch, count, shape, radius, among_batch, masked
) -> None:
    generator = torch.Generator().manual_seed(batch * 100 + count)
    x, z = (torch.randn(n, *shape, generator=generator).to(dtype) for n in (batch, count))
    mask = (torch.rand(1, 1, *shape[1:], generator=generator) > 0.4).to(dtype) if masked else None
    result = repellency(x, [References(z)], SpellSettings(radius=radius, among_batch=among_batch), mask)
    assert (
        result.delta.shape == x.shape
        and result.delta.dtype == dtype
        and bool(torch.isfinite(result.delta).all())
    )
    for sample in range(batch):
        moved = bool(result.delta[sample].any())
        assert moved <= bool(result.inside[sample] > 0)
        if result.nearest[sample] > radius * 1.0001:
            assert not moved
