"""Semantic Guidance: the hand-computed step, warm-up and cool-down, and a second derivation in noise
predictions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safe_guidance.guidance.core.noise_level import NoiseLevel, SigmaWindow
from safe_guidance.guidance.core.paper_schedule import sigma_of_step
from safe_guidance.guidance.semantic_guidance import (
    Concept,
    SemanticGuidanceSettings,
    concept_guidance,
    denoised_change,
    semantic_guidance,
)

SIGMA = 2.5
LEVEL = NoiseLevel.variance_exploding(SIGMA)
ALWAYS = SigmaWindow()


def denoised(noise: Tensor, x: Tensor | float = 0.0, sigma: float = SIGMA) -> Tensor:
    return x - sigma * noise


def ten() -> tuple[Tensor, Tensor, Tensor]:
    """Return u = 0, p = 0.2 and a concept of 0.1 to 1.0, for ten pixels of one channel."""
    zero = torch.zeros(1, 1, 2, 5, dtype=torch.float64)
    return zero, zero + 0.2, (torch.arange(1, 11, dtype=torch.float64) / 10).view(1, 1, 2, 5)


def test_the_step_computed_by_hand() -> None:
    u, p, c = ten()
    chosen = SemanticGuidanceSettings((Concept(scale=5, threshold=0.9, window=ALWAYS),))
    cfg, nu = denoised(u) + 7.5 * (denoised(p) - denoised(u)), torch.zeros_like(u)
    outputs, moments = [], []
    for _ in range(2):
        psi, nu = semantic_guidance([denoised(c)], denoised(u), SIGMA, LEVEL, nu, chosen)
        assert psi is not None
        outputs.append((0 - (cfg + denoised_change(psi, SIGMA))) / SIGMA)
        moments.append(nu)
    expected = torch.full_like(u, 1.5)
    expected[..., -1, -1] = -3.5
    torch.testing.assert_close(outputs[0], expected)
    assert moments[0].flatten()[-1].item() == pytest.approx(-3) and not moments[0].flatten()[:-1].any()
    assert outputs[1].flatten()[-1].item() == pytest.approx(-3.8)
    kept = concept_guidance(denoised(c), denoised(u), SIGMA, chosen.concepts[0])
    assert kept.flatten()[-1].item() == pytest.approx(-5) and int((kept != 0).sum()) == 1


def test_the_threshold_keeps_the_upper_share_of_every_channel() -> None:
    prediction = torch.randn(2, 4, 10, 10, generator=torch.Generator().manual_seed(1))
    kept = concept_guidance(prediction, torch.zeros_like(prediction), 1.0, Concept(threshold=0.9)) != 0
    assert (kept.sum((2, 3)) == 10).all()
    flat = concept_guidance(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), 1.0, Concept(threshold=0.9))
    assert (flat != 0).all()


def test_adding_is_the_opposite_of_removing() -> None:
    u, _, c = ten()
    away = concept_guidance(denoised(c), denoised(u), SIGMA, Concept())
    towards = concept_guidance(denoised(c), denoised(u), SIGMA, Concept(remove=False))
    assert torch.equal(away, -towards)


def test_while_some_concepts_warm_up_the_others_act_alone_and_without_momentum() -> None:
    u, _, c = ten()
    early = Concept(threshold=0.0, window=SigmaWindow(high=10.0), weight=3.0)
    late = Concept(scale=2.0, threshold=0.0, window=SigmaWindow(high=1.0))
    chosen = SemanticGuidanceSettings((early, late), momentum_scale=0.5)
    nu = torch.full_like(u, 7.0)
    psi, after = semantic_guidance([denoised(c), denoised(c)], denoised(u), SIGMA, LEVEL, nu, chosen)
    assert psi is not None
    torch.testing.assert_close(psi, -5 * c)
    torch.testing.assert_close(after, 0.4 * nu + 0.6 * (-3 * 5 * c - 2 * c + 0.5 * nu))
    none, _ = semantic_guidance(
        [denoised(c), denoised(c)], denoised(u), 12.0, NoiseLevel.variance_exploding(12.0), nu, chosen
    )
    assert none is None
    below, _ = semantic_guidance(
        [denoised(c, sigma=0.5)] * 2,
        denoised(u, sigma=0.5),
        0.5,
        NoiseLevel.variance_exploding(0.5),
        nu,
        chosen,
    )
    torch.testing.assert_close(below, -3 * 5 * c - 2 * c + 0.5 * nu)


def test_after_its_cool_down_a_concept_is_silent() -> None:
    u, _, c = ten()
    cold = Concept(threshold=0.0, window=SigmaWindow(high=20.0, low=5.0))
    chosen = SemanticGuidanceSettings(
        (cold, Concept(scale=2.0, threshold=0.0, window=ALWAYS)), momentum_scale=0.0
    )
    assert chosen.needed(LEVEL) == [1]
    psi, _ = semantic_guidance([None, denoised(c)], denoised(u), SIGMA, LEVEL, torch.zeros_like(u), chosen)
    torch.testing.assert_close(psi, -2 * c)


def test_what_is_needed_when() -> None:
    warm, cold = NoiseLevel.variance_exploding(1.0), NoiseLevel.variance_exploding(14.0)
    with_momentum = SemanticGuidanceSettings((Concept(), Concept(scale=0.0)))
    without = replace(with_momentum, momentum_scale=0.0)
    assert with_momentum.needed(cold) == [0] and without.needed(cold) == [] and not without.acts(cold)
    assert without.needed(warm) == [0] and without.acts(warm)
    off = SemanticGuidanceSettings((Concept(scale=0.0),))
    assert not off.acts(warm) and not off.acts(cold)
    cooled = SemanticGuidanceSettings((Concept(window=SigmaWindow(high=9.0, low=5.0)),))
    # Momentum of a concept that has cooled down still acts, and costs no forward.
    assert cooled.needed(warm) == [] and cooled.acts(warm)


def test_half_precision_gives_the_single_precision_result() -> None:
    generator = torch.Generator().manual_seed(2)
    half = [torch.randn(1, 4, 16, 16, generator=generator).half() for _ in range(2)]
    low = concept_guidance(half[0], half[1], SIGMA, Concept())
    single = concept_guidance(half[0].float(), half[1].float(), SIGMA, Concept())
    assert low.dtype == torch.float32 and torch.equal(low, single)


def paper_loop(
    noise: list[list[Tensor]], warm_ups: list[int], cool_downs: list[int], chosen: SemanticGuidanceSettings
) -> list[Tensor]:
    """Run the published loop, written on noise predictions (u, p, concepts) and step indices."""
    momentum, outputs = torch.zeros_like(noise[0][0]), []
    for i, (u, p, *edits) in enumerate(noise):
        result, kept, warm = u + 7.5 * (p - u), [], []
        for c, (concept, e) in enumerate(zip(chosen.concepts, edits)):
            if i >= warm_ups[c]:
                warm.append(c)
            if i >= cool_downs[c]:
                kept.append(torch.zeros_like(u))
                continue
            edit = (e - u) * (-1 if concept.remove else 1) * concept.scale
            limit = torch.quantile(edit.abs().flatten(2), concept.threshold, dim=2)[:, :, None, None]
            kept.append(torch.where(edit.abs() >= limit, edit, torch.zeros_like(edit)))
        if 0 < len(warm) < len(kept):
            weights = torch.tensor([chosen.concepts[c].weight for c in warm], dtype=u.dtype)
            weights = weights / weights.sum()
            result = result + sum(w * kept[c] for w, c in zip(weights, warm))
        total = (
            sum(concept.weight * edit for concept, edit in zip(chosen.concepts, kept))
            + chosen.momentum_scale * momentum
        )
        momentum = chosen.momentum_decay * momentum + (1 - chosen.momentum_decay) * total
        outputs.append(result + total if len(warm) == len(kept) else result)
    return outputs


@given(
    seed=st.integers(0, 10_000),
    warm_ups=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    cool_down=st.integers(25, 50),
    momentum=st.sampled_from([0.0, 0.1, 0.3]),
)
@settings(max_examples=30, deadline=None)
def test_a_whole_run_equals_the_published_loop_on_noise_predictions(
    seed: int, warm_ups: tuple[int, int], cool_down: int, momentum: float
) -> None:
    def window(warm_up: int, until: int) -> SigmaWindow:
        # The cool-down step itself is already silent: the window ends just above its noise level.
        return SigmaWindow(high=sigma_of_step(warm_up), low=sigma_of_step(until - 0.5) if until < 50 else 0.0)

    concepts = (
        Concept(scale=5, threshold=0.9, window=window(warm_ups[0], cool_down)),
        Concept(scale=3, remove=False, threshold=0.5, window=window(warm_ups[1], 50), weight=0.5),
    )
    chosen = SemanticGuidanceSettings(concepts, momentum_scale=momentum)
    generator = torch.Generator().manual_seed(seed)
    noise = [
        [torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
        for _ in range(50)
    ]
    expected = paper_loop(noise, list(warm_ups), [cool_down, 50], chosen)
    nu = torch.zeros_like(noise[0][0])
    for i, (u, p, *edits) in enumerate(noise):
        sigma = sigma_of_step(i)
        level = NoiseLevel.variance_exploding(sigma)
        x = sigma * torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
        needed = chosen.needed(level)
        predictions = [denoised(e, x, sigma) if c in needed else None for c, e in enumerate(edits)]
        psi, nu = semantic_guidance(predictions, denoised(u, x, sigma), sigma, level, nu, chosen)
        result = denoised(u, x, sigma) + 7.5 * (denoised(p, x, sigma) - denoised(u, x, sigma))
        if psi is not None:
            result = result + denoised_change(psi, sigma)
        torch.testing.assert_close((x - result) / sigma, expected[i], atol=1e-5, rtol=1e-5)
