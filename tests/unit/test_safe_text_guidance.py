"""STG and SDG in closed form.

The toy model x0 | c ~ N(A c, s0^2 I), whose denoiser is known exactly, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_guidance.guidance.core.noise_level import NoiseLevel
from safe_guidance.guidance.safe_data_guidance import (
    SafeDataGuidanceSettings,
    data_guidance,
    latent_gradient_from_prediction,
)
from safe_guidance.guidance.safe_text_guidance import SafeTextGuidanceSettings, acts_at, guided_embedding

A = torch.tensor([1.0, 0.0], dtype=torch.float64)
V = torch.tensor([0.6, 0.8], dtype=torch.float64)
S0 = 0.5

RAW = SafeTextGuidanceSettings(rho=0.5, unit="raw", trust=math.inf)
NORMALIZED = SafeTextGuidanceSettings(rho=0.5, unit="normalized", trust=math.inf)


def denoised(x: Tensor, c: Tensor, sigma: float) -> Tensor:
    """Return E[x0 | x_t, c] of the toy model: (B, 2), (B,) -> (B, 2)."""
    return (S0**2 * x + sigma**2 * c[:, None] * A) / (S0**2 + sigma**2)


def unsafe(prediction: Tensor, v: Tensor = V) -> Tensor:
    """Return U = -g with the linear g = v . x."""
    return -(prediction @ v)


def text_step(
    x: Tensor,
    c: Tensor,
    sigma: float,
    settings: SafeTextGuidanceSettings,
    score: Callable[[Tensor], Tensor] = unsafe,
) -> Tensor:
    """Move the embedding once: (B,) -> (B,)."""
    leaf = c.clone().requires_grad_(True)
    scores = score(denoised(x, leaf, sigma))
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    return guided_embedding(
        c[:, None, None], c[:, None, None], gradient[:, None, None], scores.detach(), settings
    )[0][:, 0, 0]


def data_step(
    x: Tensor, c: Tensor, sigma: float, strength: float, score: Callable[[Tensor], Tensor] = unsafe
) -> Tensor:
    """Return the change of the prediction by SDG with lambda = strength: (B, 2) as (B, 2, 1, 1)."""
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(denoised(leaf, c, sigma)).sum(), leaf)
    shaped = (t[:, :, None, None] for t in (denoised(x, c, sigma), gradient))
    settings = SafeDataGuidanceSettings(strength=strength, scale="raw")
    return data_guidance(*shaped, NoiseLevel.variance_exploding(sigma), settings)[0][..., 0, 0].double()


def point(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_stg_1_one_step_in_closed_form() -> None:
    x, c = point(1, 2), torch.ones(1, dtype=torch.float64)
    assert denoised(x, c, 1.0).tolist() == [[pytest.approx(1.0), pytest.approx(0.4)]]
    raw, normalized = (text_step(x, c, 1.0, settings) for settings in (RAW, NORMALIZED))
    assert raw.item() == pytest.approx(1.24)
    assert denoised(x, raw, 1.0)[0].tolist() == pytest.approx([1.192, 0.4])
    assert normalized.item() == pytest.approx(1.5)
    assert denoised(x, normalized, 1.0)[0].tolist() == pytest.approx([1.4, 0.4])


def test_sdg_1_one_step_in_closed_form() -> None:
    x, c = point(1, 2), torch.ones(1, dtype=torch.float64)
    assert (denoised(x, c, 1.0) + data_step(x, c, 1.0, 0.5))[0].tolist() == pytest.approx([1.06, 0.48])


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.1, 5), st.floats(0.05, 2))
def test_stg_2_theorem_1_is_exact_for_a_linear_score(x0: float, x1: float, sigma: float, rho: float) -> None:
    x, c = point(x0, x1), torch.ones(1, dtype=torch.float64)
    moved = text_step(x, c, sigma, SafeTextGuidanceSettings(rho=rho, unit="raw", trust=math.inf)).double()
    change = (denoised(x, moved, sigma) - denoised(x, c, sigma)) / sigma**2
    # rho grad_x (grad_c g . grad_c log q(x_t | c)), with grad_c log q = A . (x_t - A c) / (s0^2 + sigma^2).
    expected = rho * sigma**2 / (S0**2 + sigma**2) ** 2 * (A @ V) * A
    torch.testing.assert_close(change[0], expected, rtol=2e-5, atol=2e-6)


def test_stg_2_theorem_1_holds_with_the_gradient_of_g_held_fixed() -> None:
    """For a curved g, the change follows rho grad_x(v . grad_c log q) with v = grad_c g fixed.

    The whole gradient, through v as well, is another number.
    """
    x, c, sigma, rho = point(0.8, -0.3), torch.full((1,), 0.7, dtype=torch.float64), 1.0, 1e-5
    leaf, embedding = x.clone().requires_grad_(True), c.clone().requires_grad_(True)

    def curved(prediction: Tensor) -> Tensor:
        return -torch.sin(2 * prediction).sum(1)

    g = -curved(denoised(leaf, embedding, sigma))
    (v,) = torch.autograd.grad(g.sum(), embedding, create_graph=True)
    grad_c_log_q = (leaf - embedding[:, None] * A) @ A / (S0**2 + sigma**2)
    fixed = torch.autograd.grad((v.detach() * grad_c_log_q).sum(), leaf, retain_graph=True)[0]
    whole = torch.autograd.grad((v * grad_c_log_q).sum(), leaf)[0]

    moved = c + rho * v.detach()
    change = (denoised(x, moved, sigma) - denoised(x, c, sigma)) / sigma**2
    torch.testing.assert_close(change, rho * fixed, rtol=1e-3, atol=1e-12)
    assert (whole - fixed).abs().max() > 0.1 * fixed.abs().max()
    # The method's own move, in single precision, is this one.
    settings = SafeTextGuidanceSettings(rho=0.1, unit="raw", trust=math.inf)
    torch.testing.assert_close(text_step(x, c, sigma, settings, curved).double(), c + 0.1 * v.detach())


def test_stg_2_the_residual_is_of_second_order_for_a_curved_score() -> None:
    """To first order the unsafe score falls by rho |grad_c U|^2; halving rho quarters what is left."""
    x, c = point(0.8, -0.3), torch.full((1,), 0.7, dtype=torch.float64)

    def curved(prediction: Tensor) -> Tensor:
        return torch.sin(2 * prediction).sum(1)

    leaf = c.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(curved(denoised(x, leaf, 1.0)).sum(), leaf)

    def residual(rho: float) -> float:
        settings = SafeTextGuidanceSettings(rho=rho, unit="raw", trust=math.inf)
        moved = text_step(x, c, 1.0, settings, curved).double()
        return (
            curved(denoised(x, moved, 1.0)) - curved(denoised(x, c, 1.0))
        ).item() + rho * slope.item() ** 2

    assert abs(residual(0.2)) > 1e-3
    assert residual(0.2) / residual(0.1) == pytest.approx(4, rel=0.1)


def test_stg_3_what_the_model_cannot_express_does_not_move_it() -> None:
    x, c = point(1, 2), torch.ones(1, dtype=torch.float64)

    def off_manifold(prediction: Tensor) -> Tensor:
        return unsafe(prediction, torch.tensor([0.0, 1.0], dtype=torch.float64))

    assert torch.equal(text_step(x, c, 1.0, NORMALIZED, off_manifold), c)
    assert data_step(x, c, 1.0, 0.5, off_manifold)[0, 1] > 0.05


@pytest.mark.parametrize(
    ("method", "mean"), [("none", (1.003, -0.001)), ("stg", (1.191, -0.001)), ("sdg", (1.074, 0.095))]
)
def test_stg_4_sampling(method: str, mean: tuple[float, float]) -> None:
    """Karras noise levels from 10 to 0.01, 50 Euler steps: STG moves along A only, SDG off it."""
    count, steps, rho = 20000, 50, 7.0
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = [*((10 ** (1 / rho) + ramp * (0.01 ** (1 / rho) - 10 ** (1 / rho))) ** rho).tolist(), 0.0]
    # Started from the true marginal, whose mean is A c: pure noise of this level still pulls the mean by 5 %.
    x = A + (S0**2 + 100) ** 0.5 * torch.randn(
        count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    c = torch.ones(count, dtype=torch.float64)
    for sigma, following in zip(sigmas, sigmas[1:]):
        used = text_step(x, c, sigma, RAW).double() if method == "stg" else c
        prediction = denoised(x, used, sigma)
        if method == "sdg":
            prediction = prediction + data_step(x, c, sigma, 0.5)
        x = prediction + following / sigma * (x - prediction)
    assert x.mean(0).tolist() == pytest.approx(mean, abs=0.015)
    if method == "none":
        assert x[:, 1].std().item() == pytest.approx(0.484, abs=0.015)


def random_case(batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    current, initial, gradient = (torch.randn(batch, 5, 4, generator=generator) for _ in range(3))
    return current, initial, gradient, torch.rand(batch, generator=generator)


def test_stg_5_rho_0_is_the_identity() -> None:
    current, initial, gradient, score = random_case()
    for unit in ("relative", "normalized", "raw"):
        new, _ = guided_embedding(
            current, initial, gradient, score, SafeTextGuidanceSettings(rho=0.0, unit=unit, trust=math.inf)
        )
        assert torch.equal(new, current)


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf, 1e-20])
def test_stg_6_a_gradient_that_says_nothing_moves_nothing(broken: float) -> None:
    current, initial, gradient, score = random_case()
    gradient[1] = broken
    settings = SafeTextGuidanceSettings(prior_weight=3.0)
    new, moved = guided_embedding(current, initial, gradient, score, settings)
    assert moved.tolist() == [True, False, True]
    assert torch.equal(new[1], current[1]) and torch.isfinite(new).all()
    assert not torch.equal(new[0], current[0])


def test_samples_are_independent() -> None:
    current, initial, gradient, score = random_case()
    together = guided_embedding(current, initial, gradient, score, SafeTextGuidanceSettings())[0]
    alone = [
        guided_embedding(
            *(t[i : i + 1] for t in (current, initial, gradient, score)), SafeTextGuidanceSettings()
        )[0]
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


@given(st.floats(1e-4, 0.5), st.floats(1e-3, 1e3), st.integers(0, 100))
def test_a_move_has_the_length_that_its_unit_says(rho: float, size: float, seed: int) -> None:
    _, initial, gradient, score = random_case(seed=seed)
    for unit, length in (
        ("relative", rho * initial.flatten(1).norm(dim=1)),
        ("normalized", torch.full((3,), rho)),
        ("raw", rho * size * gradient.flatten(1).norm(dim=1)),
    ):
        settings = SafeTextGuidanceSettings(rho=rho, unit=unit, trust=math.inf)  # type: ignore[arg-type]
        new, _ = guided_embedding(initial, initial, size * gradient, score, settings)
        torch.testing.assert_close((initial - new).flatten(1).norm(dim=1), length, rtol=2e-3, atol=1e-5)


@given(st.floats(0.01, 0.5), st.integers(0, 100))
def test_the_trust_region_holds_over_many_moves(trust: float, seed: int) -> None:
    _, initial, gradient, score = random_case(seed=seed)
    settings, current = SafeTextGuidanceSettings(rho=0.05, trust=trust), initial
    for _ in range(20):
        current, _ = guided_embedding(current, initial, gradient, score, settings)
    distance = (current - initial).flatten(1).norm(dim=1) / initial.flatten(1).norm(dim=1)
    torch.testing.assert_close(distance, torch.full((3,), trust), rtol=1e-3, atol=1e-5)


def test_the_prior_pulls_back_to_the_prompt() -> None:
    current, initial, _, score = random_case()
    faint = torch.full_like(current, 1e-9)
    settings = SafeTextGuidanceSettings(rho=0.1, unit="raw", prior_weight=1.0, trust=math.inf)
    new = guided_embedding(current, initial, faint, score, settings)[0]
    torch.testing.assert_close(new, current - 0.1 * 2 * (current - initial) / current[0].numel())


def test_rho_grows_with_the_score() -> None:
    _, initial, gradient, _ = random_case()
    score = torch.tensor([0.0, 0.25, 5.0])
    settings = SafeTextGuidanceSettings(rho=0.1, full_score=0.5)
    new, _ = guided_embedding(initial, initial, gradient, score, settings)
    share = (initial - new).flatten(1).norm(dim=1) / initial.flatten(1).norm(dim=1)
    torch.testing.assert_close(share, torch.tensor([0.0, 0.05, 0.1]), rtol=1e-3, atol=1e-6)


def test_gamma_spreads_its_share_evenly() -> None:
    assert [k for k in range(11) if acts_at(k, 0.4)] == [0, 2, 5, 7, 10]
    assert all(acts_at(k, 1.0) for k in range(50)) and not any(acts_at(k, 0.0) for k in range(50))


@given(st.floats(0.01, 1.0), st.integers(1, 200))
def test_gamma_is_the_share_of_steps(gamma: float, steps: int) -> None:
    assert sum(acts_at(k, gamma) for k in range(steps)) == math.ceil(round(steps * gamma, 9))


@given(st.floats(0.05, 0.95), st.integers(0, 50))
def test_sdg_2_flow_and_variance_exploding_agree(t: float, seed: int) -> None:
    """The same data seen at x_t = (1 - t) x0 + t eps and at x_t / (1 - t).

    Gradients with respect to x_t scale with 1 - t.
    """
    generator = torch.Generator().manual_seed(seed)
    prediction, gradient = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2))
    settings = SafeDataGuidanceSettings(strength=0.3, scale="raw")
    flow, _ = data_guidance(prediction, gradient, NoiseLevel(1 - t, t), settings)
    exploding, _ = data_guidance(
        prediction, gradient * (1 - t), NoiseLevel.variance_exploding(t / (1 - t)), settings
    )
    torch.testing.assert_close(flow, exploding, rtol=1e-4, atol=1e-6)
    cheap_flow = latent_gradient_from_prediction(gradient, NoiseLevel(1 - t, t))
    cheap_exploding = latent_gradient_from_prediction(gradient, NoiseLevel.variance_exploding(t / (1 - t)))
    torch.testing.assert_close(cheap_flow * (1 - t), cheap_exploding)


def test_sdg_2_the_first_step_of_a_flow_model_is_finite() -> None:
    ones = torch.ones(1, 4, 2, 2)
    settings = SafeDataGuidanceSettings(strength=1.0, scale="raw")
    assert torch.isfinite(data_guidance(ones, ones, NoiseLevel(0.0, 1.0), settings)[0]).all()
    assert torch.isfinite(latent_gradient_from_prediction(ones, NoiseLevel(0.0, 1.0))).all()


@pytest.mark.parametrize("scale", ["relative", "raw"])
def test_sdg_3_strength_0_changes_nothing(scale: str) -> None:
    prediction = torch.randn(2, 4, 3, 3)
    settings = SafeDataGuidanceSettings(strength=0.0, scale=scale)  # type: ignore[arg-type]
    delta, _ = data_guidance(
        prediction, torch.randn_like(prediction), NoiseLevel.variance_exploding(2.0), settings
    )
    assert torch.equal(delta, torch.zeros_like(delta))


def test_sdg_relative_strength_is_a_share_of_the_prediction() -> None:
    prediction, gradient = torch.randn(3, 4, 3, 3), torch.randn(3, 4, 3, 3)
    gradient[1] = math.nan
    delta, usable = data_guidance(
        prediction, gradient, NoiseLevel.variance_exploding(2.0), SafeDataGuidanceSettings(strength=0.2)
    )
    assert usable.tolist() == [True, False, True]
    share = delta.flatten(1).norm(dim=1) / prediction.flatten(1).norm(dim=1)
    torch.testing.assert_close(share, torch.tensor([0.2, 0.0, 0.2]))
