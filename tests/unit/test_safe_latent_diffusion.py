"""Safe Latent Diffusion: the hand-computed steps of the specification, identities, and a second derivation
in noise predictions.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safe_guidance.guidance.core.noise_level import NoiseLevel
from safe_guidance.guidance.core.paper_schedule import sigma_of_step, sigma_of_timestep, timestep_of_step
from safe_guidance.guidance.safe_latent_diffusion import (
    MAX,
    MEDIUM,
    PRESETS,
    STRONG,
    WEAK,
    SafeLatentDiffusionSettings,
    denoised_change,
    safety_guidance,
    safety_weight,
)

SIGMA = 1.7
NOISY = torch.tensor([0.3, -1.2, 2.0, 0.4], dtype=torch.float64).view(1, 1, 2, 2)
SCALE = 7.5
Any4 = tuple[float, float, float, float]


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 2, 2)


def denoised(noise: Tensor, x: Tensor = NOISY, sigma: float = SIGMA) -> Tensor:
    return x - sigma * noise


UNCOND, COND, SAFETY = row(0, 0, 0, 0), row(0.10, 0.20, -0.10, 0.0005), row(0.09, 0.25, 0.30, 0)
NOTHING = torch.zeros_like(COND)


def output(guidance: Tensor) -> Tensor:
    """Return the noise prediction after guidance, from the change of the denoised one."""
    cfg = denoised(UNCOND) + SCALE * (denoised(COND) - denoised(UNCOND))
    return (NOISY - (cfg + denoised_change(guidance, SIGMA, SCALE))) / SIGMA


def step(momentum: Tensor, preset: SafeLatentDiffusionSettings) -> tuple[Tensor, Tensor]:
    return safety_guidance(denoised(COND), denoised(UNCOND), denoised(SAFETY), SIGMA, momentum, preset)


@pytest.mark.parametrize(
    ("preset", "weight", "first", "second", "momentum"),
    [
        (WEAK, (0, 1, 1, 0), (0.75, -0.375, -3, 0.00375), (0.75, -0.375, -3, 0.00375), (0, 0.25, 0.3, 0)),
        (
            MEDIUM,
            (0, 1, 1, 0.5),
            (0.75, -0.375, -3, 0.00375),
            (0.75, -0.7125, -3.405, 0.00375),
            (0, 0.15, 0.18, 0),
        ),
        (
            STRONG,
            (1, 1, 1, 1),
            (0.075, -0.375, -3, 0.00375),
            (-0.02625, -0.65625, -3.3375, 0.00375),
            (0.027, 0.075, 0.09, 0),
        ),
        (
            MAX,
            (1, 1, 1, 1),
            (0.075, -0.375, -3, 0.00375),
            (-0.02625, -0.65625, -3.3375, 0.00375),
            (0.027, 0.075, 0.09, 0),
        ),
    ],
    ids=["weak", "medium", "strong", "max"],
)
def test_the_steps_computed_by_hand(
    preset: SafeLatentDiffusionSettings, weight: Any4, first: Any4, second: Any4, momentum: Any4
) -> None:
    close = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(
        safety_weight(denoised(COND), denoised(SAFETY), SIGMA, preset), row(*weight), atol=1e-6, rtol=0
    )
    guidance, after = step(NOTHING, preset)
    torch.testing.assert_close(output(guidance), row(*first), **close)
    torch.testing.assert_close(after, row(*momentum), **close)
    torch.testing.assert_close(output(step(after, preset)[0]), row(*second), **close)


def test_the_presets_are_the_papers() -> None:
    """Warm-ups of 15, 10, 7 and 0 of 50 steps are the noise levels of those steps on Stable Diffusion's
    schedule.
    """
    assert [PRESETS[name].window.high for name in ("weak", "medium", "strong")] == pytest.approx(
        [3.0930, 4.6917, 6.1970], rel=1e-4
    )
    assert PRESETS["max"].window.high == math.inf
    assert [p.scale for p in PRESETS.values()] == [20, 1000, 2000, 5000]


def test_the_papers_steps_as_noise_levels() -> None:
    assert [timestep_of_step(step) for step in (0, 5, 10, 49)] == [981, 881, 781, 1]
    assert [sigma_of_timestep(t) for t in (999, 800, 400, 200, 0)] == pytest.approx(
        [14.6146, 5.1110, 1.1644, 0.5717, 0.0292], rel=2e-3
    )
    assert sigma_of_step(10.5) == pytest.approx(math.sqrt(sigma_of_timestep(771) * sigma_of_timestep(771)))
    with pytest.raises(ValueError, match="not on the schedule"):
        sigma_of_timestep(1200)


def test_warm_up_needs_the_text_for_momentum_only() -> None:
    early, late = NoiseLevel.variance_exploding(14.0), NoiseLevel.variance_exploding(1.0)
    assert MEDIUM.needs_prediction(early) and early not in MEDIUM.window
    assert not WEAK.needs_prediction(early)
    assert all(preset.needs_prediction(late) and late in preset.window for preset in PRESETS.values())
    assert not replace(MEDIUM, scale=0.0).needs_prediction(late)
    # Rectified flow starts at pure noise, which is before every warm-up but MAX's.
    assert NoiseLevel(0.0, 1.0) not in STRONG.window and NoiseLevel(0.0, 1.0) in MAX.window


def test_momentum_builds_up_during_the_warm_up() -> None:
    _, nu = step(NOTHING, MEDIUM)
    assert nu.abs().max() > 0
    _, more = step(nu, MEDIUM)
    assert (more.abs() >= nu.abs()).all()


def test_nothing_unsafe_in_the_prompt_is_the_identity() -> None:
    """A prompt that exceeds the unsafe text in every element stays bit-identical."""
    guidance, nu = safety_guidance(
        denoised(row(5, 5, 5, 5)), denoised(UNCOND), denoised(row(1, 1, 1, 1)), SIGMA, NOTHING, STRONG
    )
    assert not guidance.any() and not nu.any()


def paper_loop(
    noise: list[tuple[Tensor, Tensor, Tensor]], preset: SafeLatentDiffusionSettings, warm_up: int
) -> list[Tensor]:
    """Run the published loop, written on noise predictions and step indices."""
    momentum, outputs = torch.zeros_like(noise[0][0]), []
    for index, (u, p, s) in enumerate(noise):
        guidance = p - u
        scale = torch.clamp(torch.abs(p - s) * preset.scale, max=1.0)
        scale = torch.where((p - s) >= preset.threshold, torch.zeros_like(scale), scale)
        safety = torch.mul(s - u, scale) + preset.momentum_scale * momentum
        momentum = preset.momentum_decay * momentum + (1 - preset.momentum_decay) * safety
        if index >= warm_up:
            guidance = guidance - safety
        outputs.append(u + SCALE * guidance)
    return outputs


@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(PRESETS)))
@settings(max_examples=40, deadline=None)
def test_a_whole_run_equals_the_published_loop_on_noise_predictions(seed: int, name: str) -> None:
    preset, warm_up = PRESETS[name], {"weak": 15, "medium": 10, "strong": 7, "max": 0}[name]
    generator = torch.Generator().manual_seed(seed)
    noise = [
        tuple(torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
        for _ in range(50)
    ]
    expected = paper_loop(noise, preset, warm_up)  # type: ignore[arg-type]
    momentum = torch.zeros_like(noise[0][0])
    for index, (u, p, s) in enumerate(noise):
        sigma = sigma_of_step(index)
        level = NoiseLevel.variance_exploding(sigma)
        x = sigma * torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
        d_u, d_p, d_s = (x - sigma * n for n in (u, p, s))
        guidance, momentum = safety_guidance(d_p, d_u, d_s, sigma, momentum, preset)
        result = d_u + SCALE * (d_p - d_u)
        if level in preset.window:
            result = result + denoised_change(guidance, sigma, SCALE)
        torch.testing.assert_close((x - result) / sigma, expected[index], atol=1e-5, rtol=1e-5)


def test_a_velocity_model_gives_what_the_same_noise_model_gives() -> None:
    """v-prediction is another form of the same denoised prediction, so thresholds must give the same
    result.
    """
    generator = torch.Generator().manual_seed(4)
    x = 3.0 * torch.randn(1, 4, 5, 5, generator=generator, dtype=torch.float64)
    sigma = 3.0
    noise = [torch.randn(1, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    from_noise = [x - sigma * n for n in noise]
    # v = (noise - sigma * x / (sigma^2 + 1)) * sqrt(sigma^2 + 1) / 1 for sigma_data = 1, and back as the host
    # does it.
    velocity = [(x / (sigma**2 + 1) - d) * math.sqrt(sigma**2 + 1) / sigma for d in from_noise]
    from_velocity = [x / (sigma**2 + 1) - v * sigma / math.sqrt(sigma**2 + 1) for v in velocity]
    nu = torch.zeros_like(x)
    a, b = (safety_guidance(d[1], d[0], d[2], sigma, nu, STRONG)[0] for d in (from_noise, from_velocity))
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
