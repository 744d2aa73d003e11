"""Safe Denoiser for whole images.

Closed forms, the paper's ring study, equivalences, identities and invariances.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mixture
from safe_guidance.guidance.core.composition import Change, combine
from safe_guidance.guidance.core.noise_level import NoiseLevel, SigmaWindow
from safe_guidance.guidance.core.references import References, unit_pixels
from safe_guidance.guidance.safe_denoiser.choice import choose_comparison
from safe_guidance.guidance.safe_denoiser.interface import Comparison, Predictions
from safe_guidance.guidance.safe_denoiser.likelihood_ratio import kernel_logits
from safe_guidance.guidance.safe_denoiser.local import LocalComparison
from safe_guidance.guidance.safe_denoiser.official import EPSILON, published_delta
from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserResult, SafeDenoiserSettings
from safe_guidance.guidance.safe_denoiser.similarity import (
    ReferenceStatistics,
    normalized_weights,
    reference_statistics,
)
from safe_guidance.guidance.safe_denoiser.style import StyleComparison, StyledArea
from safe_guidance.guidance.safe_denoiser.whole_image import WholeImageComparison, calibrated_correction


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scenes(count: int, seed: int, shared: float = 0.4, channels: int = 4, side: int = 16) -> Tensor:
    """Make smooth random latents that share a pattern with weight `shared`; float64."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, side // 4, side // 4, generator=generator, dtype=torch.float64)
    pattern = torch.randn(
        1, channels, side // 4, side // 4, generator=torch.Generator().manual_seed(99), dtype=torch.float64
    )
    return torch.nn.functional.interpolate(
        0.8 * coarse + shared * pattern, size=(side, side), mode="bilinear"
    )


# The theorem, with the values of two Gaussians in the plane.
TWO = mixture.Mixture(double(-2, 0, 2, 0).view(2, 2), 0.25, double(0.6, 0.4), torch.tensor([False, True]))
THEOREM = [
    ((0.5, 0.3), 1.0, (0.956164, 0.06), (-1.5, 0.06), (1.7, 0.06), 3.3020216),
    ((1.5, -0.2), 0.7, (1.829885, -0.067568), (-0.817568, -0.067568), (1.831081, -0.067568), 2214.19238),
    ((3.0, 3.0), 5.0, (0.098766, 0.029703), (-1.950495, 0.029703), (2.009901, 0.029703), 1.07227475),
]


@pytest.mark.parametrize(("x", "sigma", "data", "safe", "unsafe", "odds"), THEOREM)
def test_theorem(x, sigma, data, safe, unsafe, odds) -> None:
    point = double(*x)[None]
    # Five decimals are what the table has.
    torch.testing.assert_close(TWO.data_mean(point, sigma)[0], double(*data), atol=1e-6, rtol=0)
    torch.testing.assert_close(TWO.safe_mean(point, sigma)[0], double(*safe), atol=1e-6, rtol=0)
    torch.testing.assert_close(TWO.unsafe_mean(point, sigma)[0], double(*unsafe), atol=1e-6, rtol=0)
    beta = TWO.unsafe_odds(point, sigma)
    torch.testing.assert_close(beta, double(odds), rtol=1e-7, atol=0)
    corrected = TWO.data_mean(point, sigma) + beta * (
        TWO.data_mean(point, sigma) - TWO.unsafe_mean(point, sigma)
    )
    # beta multiplies a difference that cancels to about 1e-16 / (1 / beta).
    torch.testing.assert_close(corrected, TWO.safe_mean(point, sigma), rtol=1e-12 * max(1, odds), atol=1e-12)


@pytest.fixture(scope="module")
def ring_samples() -> dict[float, Tensor]:
    """Sample the ring 6,000 times for several weights w of E_w = (1 - w) E_data + w E_safe."""
    ring = mixture.ring()
    noise = 20 * torch.randn(6000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = mixture.karras(100, 20, 0.01)

    def denoiser(weight: float):
        return lambda x, sigma: (1 - weight) * ring.data_mean(x, sigma) + weight * ring.safe_mean(x, sigma)

    return {
        w: mixture.sample(denoiser(w), noise, sigmas, second_order=True) for w in (0.0, 0.25, 0.5, 1.0, 2.0)
    }


def test_weight_study(ring_samples: dict[float, Tensor]) -> None:
    """The paper's Figure 3: half the weight leaves unsafe samples, the exact weight keeps every safe
    mode, and double the weight depletes them.
    """
    ring = mixture.ring()
    for weight, expected in {0.0: 0.2495, 0.25: 0.168, 0.5: 0.073, 1.0: 0.0, 2.0: 0.0}.items():
        assert ring.unsafe_share(ring_samples[weight]) == pytest.approx(expected, abs=0.015)
    assert ring.unsafe_share(ring_samples[0.5]) > 0.04
    assert ring.unsafe_share(ring_samples[1.0]) < 0.001
    modes = {
        w: torch.bincount(torch.cdist(s, ring.means).argmin(1), minlength=8) / len(s)
        for w, s in ring_samples.items()
    }
    assert bool((modes[1.0][2:] > 0.14).all())
    assert modes[2.0][2] < 0.13 and modes[2.0][7] < 0.13


def share_with_references(count: int, seed: int) -> float:
    """Return the unsafe share of ring samples made by the pack's estimator on `count` references in 60
    Euler steps.
    """
    ring = mixture.ring()
    generator = torch.Generator().manual_seed(seed)
    drawn = ring.means[torch.arange(count) % 2] + 0.25 * torch.randn(
        count, 2, dtype=torch.float64, generator=generator
    )
    references = References(drawn[:, :, None, None])

    def denoise(x: Tensor, sigma: float) -> Tensor:
        logits = kernel_logits(x[:, :, None, None], references, NoiseLevel.variance_exploding(sigma))
        weights, log_mean = normalized_weights(logits)
        log_density = log_mean - x.square().sum(1) / (2 * sigma**2) - math.log(2 * math.pi * sigma**2)
        probability = (0.25 * (log_density - ring.log_density(x, sigma)).exp()).clamp(max=0.98)[:, None]
        data, unsafe = ring.data_mean(x, sigma), references.mean(weights)[:, :, 0, 0]
        return (data - probability * unsafe) / (1 - probability)

    noise = 20 * torch.randn(2000, 2, dtype=torch.float64, generator=generator)
    return ring.unsafe_share(mixture.sample(denoise, noise, mixture.karras(60, 20, 0.01), second_order=False))


def test_empirical_references() -> None:
    """A quarter of the ring is unsafe. Two references remove most of it, 128 nearly all (means of three
    draws).
    """
    few, many = (sum(share_with_references(count, seed) for seed in (1, 2, 3)) / 3 for count in (2, 128))
    assert few < 0.1
    assert many < 0.015
    assert many < few


@given(st.floats(0.02, 0.98), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_flow_equals_variance_exploding(t: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, noise, references = (
        torch.randn(n, 4, 6, 5, generator=generator, dtype=torch.float64) for n in (3, 3, 7)
    )
    x = (1 - t) * x0 + t * noise
    flow = kernel_logits(x, References(references), NoiseLevel(1 - t, t))
    exploding = kernel_logits(x / (1 - t), References(references), NoiseLevel.variance_exploding(t / (1 - t)))
    torch.testing.assert_close(torch.softmax(flow, 1), torch.softmax(exploding, 1), atol=1e-9, rtol=1e-9)


def test_first_flow_step_weighs_all_references_alike() -> None:
    x, references = scenes(2, 0), References(scenes(5, 1))
    weights, _ = normalized_weights(kernel_logits(x, references, NoiseLevel(0.0, 1.0)))
    torch.testing.assert_close(weights, torch.full((2, 5), 0.2, dtype=torch.float64))
    assert NoiseLevel(0.0, 1.0) in SigmaWindow(low=4.67)


RAW = torch.tensor([[[3.0, 1], [4, 0]], [[0, 2], [1, 2]], [[-1, 1], [0, 1]]], dtype=torch.float64)[:, :, None]
QUERY = torch.tensor([[[1.0, 0.5]], [[0.25, -0.5]]], dtype=torch.float64)[None]
OFFICIAL = [
    (
        3.15,
        0.33,
        2.75530305,
        (-0.11500929, 0.80828100, 0.60864639, 0.46285060),
        (1.03795306, 0.23326727, 0.04914669, -0.65274070),
    ),
    (
        1.0,
        0.03,
        1.33667051,
        (0.0447897, 0.84127452, 0.67832782, 0.38319718),
        (0.99865631, 0.47476176, 0.22965017, -0.51149592),
    ),
    (
        13.15,
        0.9,
        2.98532369,
        (-0.13228157, 0.8049399, 0.60049989, 0.47091673),
        (1.11905342, -0.22444591, -0.2904499, -0.92382506),
    ),
]


def kernel_sum_and_mean(denoised: Tensor, references: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Return the published code's sum of exp(-||x0 - z_n|| / (2 bandwidth^2)), (B,), and its weighted mean
    (B, C, h, w).
    """
    distance = torch.cdist(denoised.flatten(1), references.flatten(1))
    kernel = torch.exp(-distance / (2 * bandwidth**2))
    total = kernel.sum(1) + EPSILON
    return total, ((kernel / total[:, None]) @ references.flatten(1)).view_as(denoised)


@pytest.mark.parametrize(("bandwidth", "scale", "total", "mean", "corrected"), OFFICIAL)
def test_published_kernel(bandwidth, scale, total, mean, corrected) -> None:
    references = unit_pixels(RAW)
    measured_total, measured_mean = kernel_sum_and_mean(QUERY, references, bandwidth)
    torch.testing.assert_close(measured_total, double(total), atol=1e-8, rtol=0)
    torch.testing.assert_close(measured_mean.flatten(), double(*mean), atol=1e-8, rtol=0)
    torch.testing.assert_close(
        (QUERY - scale * measured_mean).flatten(),
        double(*corrected),
        atol=1e-8,
        rtol=0,
    )


@pytest.mark.parametrize(("bandwidth", "scale", "total", "mean", "corrected"), OFFICIAL)
def test_official_mode_is_the_published_kernel_with_a_bandwidth_independent_of_the_size(
    bandwidth, scale, total, mean, corrected
) -> None:
    delta = published_delta(
        QUERY, References(RAW, prepare=unit_pixels), math.sqrt(4) / (2 * bandwidth**2), scale
    )
    torch.testing.assert_close((QUERY + delta).flatten(), double(*corrected), atol=1e-8, rtol=0)


def test_official_mode_needs_a_near_reference_when_its_bandwidth_is_one() -> None:
    """This is the bandwidth of the released fast modules: 1e-8 dominates the kernel sum, so almost
    nothing is subtracted.
    """
    references = References(
        torch.randn(20, 4, 32, 32, generator=torch.Generator().manual_seed(0)), prepare=unit_pixels
    )
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    assert published_delta(x, references, math.sqrt(4 * 32 * 32) / 2, 1.0).abs().max() < 1e-3
    assert published_delta(x, references, 6.45, 1.0).abs().max() > 0.05


@pytest.mark.parametrize(
    ("sigma", "weights", "log_mean"),
    [
        (1.0, (0.68956168, 0.24130366, 0.06913466), -1.20816316),
        (0.5, (0.98512790, 0.01477256, 0.0000995), -3.00862849),
    ],
)
def test_gaussian_kernel_on_the_same_vectors(sigma, weights, log_mean) -> None:
    logits = kernel_logits(QUERY, References(unit_pixels(RAW)), NoiseLevel.variance_exploding(sigma))
    logits = logits - QUERY.square().sum() / (2 * sigma**2)
    measured, measured_log_mean = normalized_weights(logits)
    # The last weight of the second row is known to seven decimals.
    torch.testing.assert_close(measured[0], double(*weights), atol=5e-8, rtol=0)
    torch.testing.assert_close(measured_log_mean, double(log_mean), atol=1e-8, rtol=0)
    if sigma == 1.0:
        mean = References(unit_pixels(RAW)).mean(measured).flatten()
        torch.testing.assert_close(
            mean, double(0.34460235, 0.90907472, 0.79295301, 0.21951304), atol=1e-8, rtol=0
        )


def test_no_underflow_in_high_dimensions() -> None:
    """Exponents are about -2164, while exp() of a float32 is zero below -104."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, 64, 64, generator=generator)
    references = x[:1] + 1.2 * torch.randn(5, 16, 64, 64, generator=generator)
    level = NoiseLevel.variance_exploding(4.67)
    weights, log_mean = normalized_weights(kernel_logits(x, References(references), level))
    reference, _ = normalized_weights(kernel_logits(x.double(), References(references.double()), level))
    direct = -(x[0].double() - references.double()).flatten(1).square().sum(1) / (2 * 4.67**2)
    assert direct.max() < -2000
    assert bool(torch.isfinite(log_mean).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    # Exponents of thousands in float32 carry an error of some 1e-4.
    torch.testing.assert_close(weights.double(), reference, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(reference[0], torch.softmax(direct, 0), atol=1e-9, rtol=1e-9)


def correct(
    denoised: Tensor, latents: Tensor, config: SafeDenoiserSettings, mask: Tensor | None = None
) -> SafeDenoiserResult:
    """Return the calibrated correction with the set's own S_ref."""
    references = References(latents)
    statistics = reference_statistics(references, config.temperature, denoised.device, mask)
    return calibrated_correction(denoised, references, statistics, config, mask)


def correct_from(
    denoised: Tensor, latents: Tensor, typical: float, config: SafeDenoiserSettings
) -> SafeDenoiserResult:
    """Return the calibrated correction with a given S_ref."""
    references = References(latents)
    contrast = reference_statistics(references, config.temperature, denoised.device).contrast
    statistics = ReferenceStatistics(contrast, torch.tensor(typical).to(denoised))
    return calibrated_correction(denoised, references, statistics, config)


def comparison(latents: Tensor, config: SafeDenoiserSettings, mask: Tensor | None = None) -> Comparison:
    """Return the comparison of the settings' mode, placed where the latents are."""
    chosen = choose_comparison(References(latents), config)
    chosen.place(latents.device, lambda references, device: references.resident(device), mask)
    return chosen


def apply(
    denoised: Tensor, latents: Tensor, config: SafeDenoiserSettings, mask: Tensor | None = None
) -> Tensor:
    """Apply the calibrated correction as the host does."""
    result = correct(denoised, latents, config, mask)
    return combine(denoised, [Change(result.delta, result.gate > 0, config.cap)], mask)


UNSAFE = scenes(40, 3)
CONFIG = SafeDenoiserSettings()


def test_identities_are_bit_exact() -> None:
    resembling, other = scenes(2, 4), scenes(2, 5, shared=0.0)
    assert not torch.equal(apply(resembling, UNSAFE, CONFIG), resembling)
    assert torch.equal(apply(resembling, UNSAFE, replace(CONFIG, strength=0.0)), resembling)
    assert torch.equal(apply(other, UNSAFE, CONFIG), other)
    assert torch.equal(apply(resembling, UNSAFE, replace(CONFIG, threshold=100.0)), resembling)
    assert torch.equal(
        apply(resembling, UNSAFE, CONFIG, mask=torch.zeros(1, 1, 16, 16, dtype=torch.float64)), resembling
    )
    assert NoiseLevel.variance_exploding(4.0) not in SigmaWindow(low=4.67)
    assert NoiseLevel.variance_exploding(4.67) in SigmaWindow(low=4.67)


def test_separates_unsafe_from_benign_even_when_blurred() -> None:
    """Early predictions are blurred: held-out unsafe ones pass the gate, and benign ones do not."""
    references = scenes(200, 3, side=32)
    unsafe, benign = scenes(40, 10, side=32), scenes(40, 11, shared=0.0, side=32)

    def share_gated(x: Tensor) -> float:
        blurred = torch.nn.functional.avg_pool2d(x, 7, stride=1, padding=3)
        return (correct(blurred, references, CONFIG).gate > 0).double().mean().item()

    assert share_gated(unsafe) > 0.9
    assert share_gated(benign) < 0.1


def test_invariances() -> None:
    x = scenes(3, 4)
    base = correct_from(x, UNSAFE, 0.2, CONFIG)
    permuted = UNSAFE[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    doubled = torch.cat([UNSAFE, UNSAFE])
    for same in (permuted, doubled):
        other = correct_from(x, same, 0.2, CONFIG)
        torch.testing.assert_close(other.similarity, base.similarity, atol=1e-12, rtol=0)
        torch.testing.assert_close(other.delta, base.delta, atol=1e-10, rtol=1e-10)
    scaled = correct_from(3 * x, UNSAFE, 0.2, CONFIG)
    torch.testing.assert_close(scaled.similarity, base.similarity, atol=1e-12, rtol=0)
    torch.testing.assert_close(scaled.delta, 3 * base.delta, atol=1e-10, rtol=1e-10)


def test_single_reference_moves_along_the_difference_at_equal_norm() -> None:
    x = scenes(1, 4)
    single = x + 0.3 * scenes(1, 5)
    config = replace(CONFIG, cap=10.0)
    result = correct_from(x, single, 0.5, config)
    moved = x + config.strength * (x - single * x.norm() / single.norm())
    torch.testing.assert_close(x + result.delta, moved * x.norm() / moved.norm(), atol=1e-12, rtol=0)


def test_keeps_the_norm_of_the_prediction() -> None:
    x = scenes(3, 4)
    result = correct(x, UNSAFE, CONFIG)
    torch.testing.assert_close((x + result.delta).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


def test_the_cap_bounds_the_change() -> None:
    x, cap = scenes(3, 4), 0.01
    assert bool(
        (correct_from(x, UNSAFE, 0.1, replace(CONFIG, cap=10.0)).delta.flatten(1).norm(dim=1) > 0.1).all()
    )
    delta = correct_from(x, UNSAFE, 0.1, replace(CONFIG, cap=cap)).delta
    # The return to the prediction's norm can lengthen a step by 1 / cos(asin(cap) / 2) at most.
    longest = cap * x.flatten(1).norm(dim=1) / math.cos(math.asin(cap) / 2)
    assert bool((delta.flatten(1).norm(dim=1) <= longest * (1 + 1e-12)).all())


@pytest.mark.parametrize("mode", ["calibrated", "exact", "tempered"])
def test_batch_equals_single_calls(mode) -> None:
    config = replace(CONFIG, mode=mode, strength=1.0)
    level = NoiseLevel.variance_exploding(5.0)
    clean = torch.cat([UNSAFE[:1], scenes(2, 4)])
    x = clean + 5 * torch.randn(clean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(part: slice) -> Tensor:
        return comparison(UNSAFE, config).correct(Predictions(x[part], clean[part], clean[part], level)).delta

    together = run(slice(0, 3))
    assert together.abs().max() > 0 or mode == "exact"
    torch.testing.assert_close(
        together, torch.cat([run(slice(i, i + 1)) for i in range(3)]), atol=1e-12, rtol=1e-12
    )


def test_exact_mode_fires_on_near_duplicates_only() -> None:
    """The likelihood ratio is about 1 / N for a copy of a reference, and zero for another image at low
    noise.
    """
    config = replace(CONFIG, mode="exact", strength=1.0)
    level = NoiseLevel.variance_exploding(0.5)
    clean = torch.cat([UNSAFE[:1], scenes(1, 40, shared=0.0)])
    x = clean + 0.5 * torch.randn(
        clean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    gate = comparison(UNSAFE, config).correct(Predictions(x, clean, clean, level)).gate
    assert gate[0].item() == pytest.approx(1 / 40, rel=0.05)
    assert gate[1] < 1e-30


@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 16),
    st.integers(2, 9),
    st.integers(2, 9),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_gives_finite_changes_of_the_same_shape(
    dtype, batch, count, channels, height, width
) -> None:
    generator = torch.Generator().manual_seed(batch * 1000 + count)
    x = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
    references = torch.randn(count, channels, height, width, generator=generator).to(dtype)
    result = correct(x, references, CONFIG)
    assert result.delta.shape == x.shape and result.delta.dtype == dtype
    assert bool(torch.isfinite(result.delta).all())
    assert result.gate.shape == (batch,) and bool(((result.gate >= 0) & (result.gate <= 1)).all())


def test_flat_predictions_and_references_are_harmless() -> None:
    flat = torch.zeros(1, 4, 8, 8)
    result = correct_from(flat, torch.ones(3, 4, 8, 8), 0.5, CONFIG)
    assert result.delta.abs().max() == 0


MARKED = torch.zeros(40, 1, 16, 16, dtype=torch.float64)
MARKED[:30, :, 3:10, 4:11] = 1
STYLED = torch.zeros(40, 1, 16, 16, dtype=torch.float64)
STYLED[:4] = 1


def test_the_masks_of_a_set_choose_the_way_of_comparing() -> None:
    for regions, expected in (
        (None, WholeImageComparison),
        (torch.ones_like(MARKED), WholeImageComparison),
        (MARKED, LocalComparison),
        (STYLED, StyleComparison),
    ):
        assert type(choose_comparison(References(UNSAFE, regions), CONFIG)) is expected
    with pytest.raises(ValueError, match="Nothing is marked as unwanted"):
        choose_comparison(References(UNSAFE, torch.zeros_like(MARKED)), CONFIG)


@pytest.mark.parametrize("regions", [None, MARKED, STYLED], ids=["whole image", "local", "style"])
@pytest.mark.parametrize("anchor", ["prediction", "unconditional"])
def test_another_run_starts_without_the_state_of_the_last(regions: Tensor | None, anchor: str) -> None:
    """The comparison that is kept between runs gives the same change as a new one, with a mask and
    without.
    """
    config = replace(CONFIG, threshold=0.05, anchor=anchor)
    images = UNSAFE[:2], scenes(2, 5)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    mask[..., :6] = 0

    def run(used: Comparison, seen: Tensor | None) -> list[Tensor]:
        used.place(torch.device("cpu"), lambda references, device: references.resident(device), seen)
        level = NoiseLevel.variance_exploding(3.0)
        return [used.correct(Predictions(x, x, 0.9 * x, level, seen)).delta for x in images]

    kept = choose_comparison(References(UNSAFE, regions), config)
    for seen in (None, mask, None):
        kept = kept.for_another_run()
        new = choose_comparison(References(UNSAFE, regions), config)
        for again, first in zip(run(kept, seen), run(new, seen)):
            assert torch.equal(again, first)


@pytest.mark.parametrize("regions", [MARKED, STYLED], ids=["local", "style"])
def test_a_resumed_run_continues_with_the_state_of_the_first(regions: Tensor) -> None:
    config = replace(CONFIG, threshold=0.05)
    x, later = UNSAFE[:2], scenes(2, 5)
    level = NoiseLevel.variance_exploding(3.0)
    first = choose_comparison(References(UNSAFE, regions), config)
    assert first.resume_data() is None
    first.correct(Predictions(x, x, 0.9 * x, level))
    second = first.for_another_run()
    second.resume(first.resume_data())
    assert torch.equal(
        second.correct(Predictions(later, later, later, level)).delta,
        first.correct(Predictions(later, later, later, level)).delta,
    )


def test_state_advances_at_new_steps_only() -> None:
    for regions in (MARKED, STYLED):
        used = choose_comparison(References(UNSAFE, regions), replace(CONFIG, threshold=0.05))
        x = UNSAFE[:2]
        result = used.correct(Predictions(x, x, x, NoiseLevel.variance_exploding(3.0), is_new=False))
        assert bool((result.gate > 0).any()) and used.resume_data() is None


def test_samples_that_need_the_unconditional_prediction() -> None:
    """With the unconditional anchor every sample needs it; a style needs it where it was found."""
    rows = torch.ones(2, dtype=torch.bool)
    anchored = replace(CONFIG, anchor="unconditional")
    assert choose_comparison(References(UNSAFE), CONFIG).unconditional_rows(rows) is None
    assert choose_comparison(References(UNSAFE), anchored).unconditional_rows(rows) is rows
    assert choose_comparison(References(UNSAFE, MARKED), anchored).unconditional_rows(rows) is None
    style = choose_comparison(References(UNSAFE, STYLED), CONFIG)
    assert style.unconditional_rows(rows) is None
    area = torch.zeros(2, 1, 16, 16, dtype=torch.float64)
    area[0, :, 3, 4] = 0.5
    style.resume(StyledArea(area))
    assert style.unconditional_rows(rows).tolist() == [True, False]
