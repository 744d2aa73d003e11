"""Scalers, masks and the guidance term against worked examples, SciPy's labelling and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_guidance.guidance.detect_and_guide import attention_maps as cam
from safe_guidance.guidance.detect_and_guide import guidance, objects
from safe_guidance.guidance.detect_and_guide.regulation import area_scale, magnitude_scale, regulate
from safe_guidance.guidance.detect_and_guide.settings import DetectAndGuideSettings, HostMask

PAPER = DetectAndGuideSettings()
NEIGHBOURS = {8: np.ones((3, 3)), 4: scipy.ndimage.generate_binary_structure(2, 1)}


def example() -> torch.Tensor:
    """Return a map with an object of 6 positions, one of 2, a faint row below the first, and a value
    below all thresholds.
    """
    detection = torch.zeros(1, 1, 8, 8)
    detection[..., 1:3, 1:4] = 0.9
    detection[..., 6, 5:7] = 0.6
    detection[..., 3, 1:4] = 0.02
    detection[..., 0, 0] = 0.008
    return detection


def with_settings(**changes: object) -> DetectAndGuideSettings:
    return DetectAndGuideSettings(**changes)  # type: ignore[arg-type]


def masks(seed: int, density: float, size: tuple[int, int] = (12, 17)) -> torch.Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) < density


def test_worked_example() -> None:
    found = regulate(example(), PAPER)
    assert found.edit.float().mean().item() == pytest.approx(0.171875)
    assert found.detected.tolist() == [True] and found.ambiguous.tolist() == [False]
    area = area_scale(found.edit[:, 0], example()[:, 0] >= 0.5, PAPER)[0]
    assert area[1, 1].item() == pytest.approx(0.46875) and area[6, 5].item() == pytest.approx(0.15625)
    scale = found.scale[0, 0]
    values = {
        "large object": scale[1, 1],
        "small object": scale[6, 6],
        "halo": scale[3, 2],
        "outside": scale[0, 0],
    }
    assert {name: v.item() for name, v in values.items()} == pytest.approx(
        {"large object": 2.34375, "small object": 0.78125, "halo": 0.9375, "outside": 0.0}
    )
    assert scale.sum().item() == pytest.approx(18.4375)


def test_nothing_above_the_detection_threshold_is_exactly_nothing() -> None:
    found = regulate(torch.rand(2, 1, 8, 8) * 0.499, PAPER)
    assert not found.rows.any() and torch.equal(found.scale, torch.zeros(2, 1, 8, 8))


def test_a_covered_image_has_no_object_yet() -> None:
    detection = torch.zeros(2, 1, 10, 10)
    detection[0].view(-1)[:80] = 0.9
    detection[1].view(-1)[:79] = 0.9
    found = regulate(detection, PAPER)
    assert found.ambiguous.tolist() == [True, False] and found.detected.tolist() == [True, True]
    assert found.scale[0].max() == 0 and found.scale[1].max() > 0


def test_scales_do_not_depend_on_the_resolution() -> None:
    large = example().repeat_interleave(2, 2).repeat_interleave(2, 3)
    coarse = regulate(example(), PAPER).scale.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(regulate(large, PAPER).scale, coarse)


def test_the_blurred_fill_lowers_no_object_and_fades_with_distance() -> None:
    detection = torch.full((1, 16, 16), 0.02)
    detection[0, 2:4, 2:4] = 0.9
    edit = torch.ones_like(detection, dtype=torch.bool)
    blurred, nearest = (
        area_scale(edit, detection >= 0.5, with_settings(fill=fill)) for fill in ("blur", "nearest")
    )
    torch.testing.assert_close(blurred[0, 2:4, 2:4], nearest[0, 2:4, 2:4])
    assert blurred[0, 15, 15] == 0 and blurred[0, 4, 4] > 0


def test_diagonal_neighbours_are_one_object_or_two() -> None:
    diagonal = torch.eye(2, dtype=torch.bool)[None]
    assert objects.label_objects(diagonal, 8)[diagonal].unique().numel() == 1
    assert objects.label_objects(diagonal, 4)[diagonal].unique().numel() == 2
    assert torch.equal(objects.object_shares(diagonal, 8)[diagonal], torch.tensor([0.5, 0.5]))
    assert torch.equal(objects.object_shares(diagonal, 4)[diagonal], torch.tensor([0.25, 0.25]))


@pytest.mark.parametrize("connectivity", [4, 8])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), density=st.floats(0.05, 0.95))
def test_labels_are_scipys_up_to_their_numbers(connectivity: int, seed: int, density: float) -> None:
    mask = masks(seed, density)
    labels = objects.label_objects(mask, connectivity)
    for ours, one in zip(labels, mask):
        theirs, count = scipy.ndimage.label(one.numpy(), structure=NEIGHBOURS[connectivity])
        assert torch.equal(ours > 0, one)
        pairs = {(int(a), int(b)) for a, b in zip(ours.flatten(), theirs.ravel()) if b}
        assert len(pairs) == count == len({a for a, _ in pairs})


def test_a_serpentine_is_one_object() -> None:
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[:, ::2] = True
    mask[:, 1::4, -1] = True
    mask[:, 3::4, 0] = True
    assert objects.label_objects(mask, 4)[mask].unique().numel() == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), density=st.floats(0.02, 0.9))
def test_filling_takes_the_nearest_value_and_the_first_of_equals(seed: int, density: float) -> None:
    known = masks(seed, density, (9, 7))[0]
    values = torch.rand(9, 7, generator=torch.Generator().manual_seed(seed)) * known
    (filled,) = objects.fill_nearest(values[None], known[None])
    places = known.nonzero().tolist()
    for row in range(9):
        for column in range(7):
            if places:
                r, c = min(places, key=lambda p: (p[0] - row) ** 2 + (p[1] - column) ** 2)
                assert filled[row, column] == values[r, c]


def test_the_magnitude_is_clamped_on_the_edit_region() -> None:
    detection = torch.tensor([0.01, 0.02, 0.05, 0.9, 0.0099])
    torch.testing.assert_close(magnitude_scale(detection, 0.01), torch.tensor([1.0, 2.0, 5.0, 5.0, 0.0]))
    torch.testing.assert_close(magnitude_scale(detection, 0.01, 1.0), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))


def test_the_magnitude_scaler_can_be_left_out() -> None:
    scale = regulate(example(), with_settings(magnitude=1.0)).scale[0, 0]
    assert scale[1, 1].item() == pytest.approx(0.46875)


def test_strength_multiplies_up_to_the_cap() -> None:
    assert regulate(example(), with_settings(strength=2.0)).scale.max().item() == pytest.approx(4.6875)
    assert regulate(example(), with_settings(strength=100.0)).scale.max().item() == 10.0


def test_a_sample_that_was_detected_before_is_held_at_a_lower_threshold() -> None:
    faint = torch.cat([example(), example()]) * 0.5
    settings = with_settings(hold_threshold=0.4)
    held = torch.tensor([True, False])
    assert regulate(faint, settings, held=held).detected.tolist() == [True, False]
    assert regulate(faint, PAPER, held=held).detected.tolist() == [False, False]
    assert regulate(faint, with_settings(hold_threshold=0.9), held=held).detected.tolist() == [
        False,
        False,
    ]


def test_the_core_takes_what_is_nearly_as_sure_as_the_surest_of_detected_samples_only() -> None:
    detection = torch.cat([example(), example() * 0.5])
    found = regulate(detection, with_settings(core=0.6))
    assert found.detected.tolist() == [True, False] and found.scale[1].max() == 0
    # 0.6 is above 0.6 times 0.9: both objects are known already; 0.02 and 0.008 are not.
    assert torch.equal(found.scale[:1], regulate(example(), PAPER).scale)
    faint = example()
    faint[..., 3, 1:4] = 0.45
    whole = regulate(faint, with_settings(core=0.5)).scale[0, 0]
    assert whole[1, 1].item() == pytest.approx(5 * 9 / 64 * 5)
    assert regulate(faint, PAPER).scale[0, 0, 1, 1].item() == pytest.approx(5 * 6 / 64 * 5)


def test_reach_confines_changes_to_the_neighbourhood_of_what_was_found() -> None:
    detection = torch.full((1, 1, 16, 16), 0.02)
    detection[..., 4:6, 4:6] = 0.9
    found = regulate(detection, with_settings(reach=2 / 16, coverage=1.01))
    near = torch.zeros(16, 16, dtype=torch.bool)
    near[2:8, 2:8] = True
    assert torch.equal(found.edit[0, 0], near) and torch.equal(found.scale[0, 0] > 0, near)
    large = detection.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wide = regulate(large, with_settings(reach=2 / 16, coverage=1.01)).edit[0, 0]
    assert torch.equal(wide, near.repeat_interleave(2, 0).repeat_interleave(2, 1))
    empty = regulate(torch.full((1, 1, 16, 16), 0.02), with_settings(reach=2 / 16, coverage=1.01))
    assert not empty.edit.any() and empty.scale.max() == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(0, 100))
def test_bounded_changes_stay_within_the_channels_values(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    denoised, delta = torch.randn(2, 2, 4, 6, 6, generator=generator, dtype=torch.float64)
    delta[..., 3:] = 0
    change = guidance.bounded(size * delta, denoised)
    assert torch.equal(change[..., 3:], torch.zeros_like(change[..., 3:]))
    after = denoised + change
    low, high = denoised.amin((2, 3), keepdim=True), denoised.amax((2, 3), keepdim=True)
    assert (after >= low - 1e-9).all() and (after <= high + 1e-9).all()
    assert (change * delta >= -1e-9).all() and (change.abs() <= (size * delta).abs() + 1e-9).all()
    torch.testing.assert_close(
        guidance.bounded(torch.zeros_like(denoised), denoised), torch.zeros_like(denoised)
    )


def test_background_noise_raises_the_edit_threshold() -> None:
    assert not regulate(example(), PAPER, background=0.03).edit[0, 0, 3].any()


def test_samples_of_a_batch_do_not_touch_each_other_and_concepts_take_the_maximum() -> None:
    a, b = example(), example().flip(-1) * 0.7
    together = regulate(torch.cat([a, b]), PAPER)
    for row, alone in enumerate((a, b)):
        assert torch.equal(together.scale[row : row + 1], regulate(alone, PAPER).scale)
    both = cam.several_concepts([a, b])
    assert torch.equal(regulate(both, PAPER).edit, (a >= 0.01) | (b >= 0.01))


def test_all_detected_everywhere_and_nothing_at_all() -> None:
    full = regulate(torch.ones(1, 1, 6, 6), PAPER)
    assert full.ambiguous.item() and full.scale.max() == 0
    assert regulate(torch.ones(1, 1, 6, 6), with_settings(coverage=1.1)).scale.unique().tolist() == [10.0]
    empty = regulate(torch.zeros(1, 1, 6, 6), PAPER)
    assert not empty.rows.any() and empty.scale.max() == 0


def predictions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made[0], made[1], made[2]


@pytest.mark.parametrize("host", ["SEGA", "SLD"])
def test_weights_of_the_three_predictions_sum_to_one(host: HostMask) -> None:
    same = predictions()[0]
    scale = torch.rand(2, 1, 8, 8, dtype=torch.float64) * 10
    assert torch.equal(
        guidance.guidance_term(same, same, same, scale, 3.0, 7.5, with_settings(host_mask=host)),
        torch.zeros_like(same),
    )


@pytest.mark.parametrize("host", ["SEGA", "SLD"])
def test_the_term_is_the_papers_in_noise_predictions(host: HostMask) -> None:
    """Second derivation: eps_u + w [(eps_p - eps_u) - S M (eps_s - eps_u)] with masks computed from noise
    predictions.
    """
    uncond, cond, safety = predictions(1)
    x, sigma, w = torch.randn(2, 4, 8, 8, dtype=torch.float64), 2.5, 7.5
    scale = torch.rand(2, 1, 8, 8, dtype=torch.float64) * 3
    u, p, s = ((x - d) / sigma for d in (uncond, cond, safety))
    if host == "SEGA":
        keep = torch.stack(
            [
                torch.stack([d >= torch.from_numpy(np.quantile(d.numpy(), 0.9, keepdims=True)) for d in row])
                for row in (s - u).abs()
            ]
        )
    else:
        keep = p - s < 0.025
    eps = u + w * ((p - u) - scale * keep * (s - u))
    guided = uncond + w * (cond - uncond)
    ours = guided + guidance.guidance_term(
        uncond, cond, safety, scale, sigma, w, with_settings(host_mask=host)
    )
    torch.testing.assert_close(ours, x - sigma * eps, atol=1e-6, rtol=1e-6)


def test_sega_keeps_a_tenth_of_every_channel() -> None:
    uncond, cond, safety = predictions(2)
    kept = guidance.host_mask(uncond, cond, safety, 1.0, PAPER).flatten(2).sum(2)
    assert torch.equal(kept, torch.full((2, 4), 7))
