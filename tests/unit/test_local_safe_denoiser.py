"""The local mode: patches are found wherever they stand, nothing else is, and only what matches is taken out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from safe_guidance.guidance.composition import Change, combine
from safe_guidance.guidance.local_safe_denoiser import (
    Patches,
    best_correlations,
    correlations,
    cut_patches,
    local_correction,
    typical_patch_similarity,
)
from safe_guidance.guidance.safe_denoiser import SafeDenoiserSettings

SIDE = 32
CONFIG = SafeDenoiserSettings(strength=1.0, threshold=0.9, temperature=0.03, cap=2.0)
SHAPE = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def picture(top: int, left: int, seed: int, scale: float = 1.0) -> Tensor:
    """A faint background with the 8 x 8 shape at a place: (1, 4, SIDE, SIDE) float64."""
    background = 0.05 * torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shape = F.interpolate(SHAPE[None], scale_factor=2)
    background[:, :, top : top + 8, left : left + 8] += scale * shape
    return background


def region(top: int, left: int) -> Tensor:
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)
    mask[..., top - 2 : top + 10, left - 2 : left + 10] = 1
    return mask


PLACES = [(4, 4), (4, 20), (20, 4), (18, 18), (10, 12)]
PATCHES = cut_patches(torch.cat([picture(*p, seed=i) for i, p in enumerate(PLACES)]), torch.cat([region(*p) for p in PLACES]))
TYPICAL = typical_patch_similarity(PATCHES, CONFIG.temperature)
CLOSED = torch.zeros(1, dtype=torch.bool)


def correct(x: Tensor, config: SafeDenoiserSettings = CONFIG, mask: Tensor | None = None, opened: Tensor = CLOSED) -> Tensor:
    result = local_correction(x, PATCHES, TYPICAL, config, opened.expand(len(x)), mask)
    return combine(x, [Change(result.delta, result.gate > 0, config.cap)], mask)


def test_finds_the_shape_at_places_that_no_reference_has() -> None:
    assert TYPICAL > 0.9
    for top, left in [(12, 6), (22, 22), (2, 14)]:
        assert best_correlations(picture(top, left, seed=50), PATCHES).max() > 0.9


def test_does_not_find_it_in_other_pictures() -> None:
    other = torch.cat([picture(0, 0, seed=60 + i, scale=0.0) for i in range(8)])
    assert best_correlations(other, PATCHES).max() < 0.6
    assert torch.equal(correct(other), other)


def test_correlation_equals_a_loop() -> None:
    """Second derivation: weighted correlation of two windows, position by position, at coarse resolution."""
    x = picture(12, 6, seed=51)
    measured, coefficient = correlations(x, PATCHES)
    small, k = F.avg_pool2d(x, PATCHES.factor)[0], PATCHES.coarse.shape[-1]
    for n, row, column in [(0, 6, 4), (2, 8, 8), (4, 9, 6)]:
        top, left = row - k // 2, column - k // 2
        window, weight = small[:, top : top + k, left : left + k], PATCHES.regions[n, 0]
        content = torch.where(weight > 0, PATCHES.coarse[n] / weight.clamp_min(1e-9), torch.zeros_like(PATCHES.coarse[n]))
        mean = (weight * window).sum((1, 2)) / weight.sum()
        centred = window - mean[:, None, None]
        covariance = (weight * centred * content).sum()
        energy_x, energy_z = (weight * centred.square()).sum(), (weight * content.square()).sum()
        assert measured[0, n, row, column].item() == pytest.approx((covariance / (energy_x * energy_z).sqrt()).item(), abs=1e-8)
        assert coefficient[0, n, row, column].item() == pytest.approx((covariance / energy_z).item(), abs=1e-8)


def test_takes_the_shape_out_and_leaves_the_rest() -> None:
    x = picture(12, 6, seed=51)
    corrected = correct(x, replace(CONFIG, threshold=0.7))

    def contrast(latent: Tensor) -> float:
        """Energy inside the shape's region without that of the regional mean, which is not the shape's."""
        window = latent[:, :, 10:22, 4:16]
        return (window - window.mean((2, 3), keepdim=True)).square().sum().item()

    assert contrast(corrected) < 0.1 * contrast(x)
    near = F.max_pool2d(region(12, 6), 2 * PATCHES.factor + 1, stride=1, padding=PATCHES.factor)
    # Elsewhere patches match badly, and a softmax at temperature 0.03 leaves them next to no weight.
    torch.testing.assert_close(corrected * (1 - near), x * (1 - near), atol=1e-3, rtol=0)


def test_contrast_does_not_matter() -> None:
    x = picture(12, 6, seed=51)
    torch.testing.assert_close(correct(4 * x), 4 * correct(x), atol=1e-9, rtol=1e-9)


def test_translating_the_picture_translates_the_correction() -> None:
    """Equivariant to shifts by whole coarse pixels, away from the border."""
    x = picture(12, 6, seed=51)
    x[:, :, :, -8:] = 0
    x[:, :, -8:] = 0
    shift = 2 * PATCHES.factor
    moved = x.roll((shift, shift), (2, 3))
    torch.testing.assert_close(correct(moved) - moved, (correct(x) - x).roll((shift, shift), (2, 3)), atol=1e-5, rtol=0)


def test_identities() -> None:
    x = picture(12, 6, seed=51)
    assert torch.equal(correct(x, replace(CONFIG, strength=0.0)), x)
    assert torch.equal(correct(x, replace(CONFIG, threshold=5.0)), x)
    assert torch.equal(correct(x, mask=torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)), x)


def test_mask_limits_where_it_looks() -> None:
    x, mask = picture(12, 6, seed=51), torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)
    mask[..., 20:] = 1
    assert torch.equal(correct(x, mask=mask), x)


def test_an_opened_gate_stays_open() -> None:
    x = picture(12, 6, seed=51)
    strict = replace(CONFIG, threshold=5.0)
    assert not torch.equal(correct(x, strict, opened=~CLOSED), x)


def test_batch_equals_single_calls() -> None:
    batch = torch.cat([picture(12, 6, seed=51), picture(0, 0, seed=60, scale=0.0), picture(20, 20, seed=52)])
    torch.testing.assert_close(correct(batch), torch.cat([correct(x[None]) for x in batch]), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("height", "width"), [(13, 17), (32, 21), (64, 40)])
def test_odd_sizes(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, height, width, generator=generator)
    regions = torch.zeros(3, 1, height, width)
    regions[:, :, 2:9, 3:11] = 1
    patches = cut_patches(latents, regions)
    config = replace(CONFIG, threshold=0.1)
    result = local_correction(latents, patches, typical_patch_similarity(patches, 0.03), config, torch.zeros(3, dtype=torch.bool))
    assert result.delta.shape == latents.shape and bool(torch.isfinite(result.delta).all())
    assert result.delta.abs().max() > 0


def test_flat_pictures_are_harmless() -> None:
    flat = torch.ones(1, 4, SIDE, SIDE, dtype=torch.float64)
    assert torch.equal(correct(flat), flat)
    with_flat = cut_patches(torch.ones(3, 4, SIDE, SIDE), torch.ones(3, 1, SIDE, SIDE))
    assert isinstance(with_flat, Patches)
    result = local_correction(torch.randn(1, 4, SIDE, SIDE), with_flat, torch.tensor(0.5), CONFIG, CLOSED)
    assert bool(torch.isfinite(result.delta).all())
