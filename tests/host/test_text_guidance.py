"""SLD and Semantic Guidance in the real host: trajectories against the papers' loops, identity, cost."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from demo_prompts import HEART, STAR
from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.safe_latent_diffusion import (
    MAX,
    MEDIUM,
    PRESETS,
    STRONG,
    WEAK,
    SafeLatentDiffusionSettings,
)
from safe_guidance.guidance.semantic_guidance import Concept, SemanticGuidanceSettings

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

STEPS, SCALE = 8, 5.0


@pytest.fixture
def text(host: Any) -> Any:
    """Attach the methods under test to any model."""
    from safe_guidance.nodes.host.engine.hooks import attach
    from safe_guidance.nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection
    from safe_guidance.nodes.host.methods.semantic_guidance import SemanticGuidanceCorrection

    def sld(model: Any, safety: list[Any], settings: SafeLatentDiffusionSettings = MEDIUM) -> Any:
        return attach(model, SafeLatentDiffusionCorrection(safety, settings))

    def sega(model: Any, concepts: list[list[Any]], settings: SemanticGuidanceSettings) -> Any:
        return attach(model, SemanticGuidanceCorrection(concepts, settings))

    return SimpleNamespace(sld=sld, sega=sega)


class Trajectory:
    """Sampler with Euler's method that records the guider's input and output at every step."""

    def __init__(self, model: Any, positive: list[Any], negative: list[Any], noise: Tensor) -> None:
        import comfy.samplers

        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(SCALE)
        guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.KSAMPLER(self._sample),
            sigmas,
            seed=0,
            disable_pbar=True,
        )

    def _sample(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        for sigma, following in zip(sigmas[:-1], sigmas[1:]):
            denoised = model(x, sigma.expand(len(x)), **extra_args)
            self.seen.append((x, sigma, denoised))
            x = x + (x - denoised) / sigma * (following - sigma)
        return x


def raw_predictions(model: Any, conds: list[list[Any]], x: Tensor, sigma: Tensor) -> list[Tensor]:
    """Return the model's predictions in float64, one conditioning at a time, without the host's
    sampling code.
    """
    rows = sigma.expand(len(x))
    return [
        model.model.apply_model(
            x, rows, c_crossattn=cond[0][0].expand(len(x), -1, -1), transformer_options={"sigmas": rows}
        ).double()
        for cond in conds
    ]


class Setting:
    """A model with a negative prompt, a prompt and a text."""

    def __init__(self, model: Any, conds: list[list[Any]], noise: Tensor) -> None:
        self.model, self.conds, self.noise = model, conds, noise

    def check(self, guarded: Any, published: Any) -> None:
        """Compare a guarded run with the published loop in float64.

        First every step alone, from the guarded run's noisy latents; then the whole run from the noise.

        `published(x, directions, sigma, momentum)` returns a denoised prediction and the next momentum.
        """
        import comfy.model_management

        run = Trajectory(guarded, self.conds[1], self.conds[0], self.noise)
        assert len(run.seen) == STEPS
        plain = Trajectory(self.model, self.conds[1], self.conds[0], self.noise).seen[-1][2].double()
        comfy.model_management.load_models_gpu([self.model])

        def expected(x: Tensor, sigma: Tensor, momentum: Any) -> tuple[Tensor, Any]:
            directions = [
                (x - d) / sigma.double() for d in raw_predictions(self.model, self.conds, x.float(), sigma)
            ]
            return published(x, directions, sigma.double(), momentum)

        momentum: Any = 0.0
        for x, sigma, denoised in run.seen:
            alone, momentum = expected(x.double(), sigma, momentum)
            # A threshold is a switch: an element within rounding of it may fall on the other side.
            difference = (denoised - alone).abs()
            assert difference.median() < 1e-3 and (difference > 1e-2).float().mean() < 0.01

        x, momentum = run.seen[0][0].double(), 0.0
        following = [*(sigma.double() for _, sigma, _ in run.seen[1:]), 0.0]
        for (_, sigma, _), then in zip(run.seen, following):
            denoised, momentum = expected(x, sigma, momentum)
            x = x + (x - denoised) / sigma.double() * (then - sigma.double())
        result = run.seen[-1][2].double()
        change = (result - plain).norm()
        assert change > 0.01 * plain.norm(), "the method must have done something"
        assert (result - x).norm() < 0.05 * change


@pytest.fixture(params=["eps", "v"])
def setting(host: Any, tiny: ModuleType, request: pytest.FixtureRequest) -> Setting:
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    if request.param == "eps":
        return Setting(host.model, [host.text(t) for t in ("", STAR, "star")], noise)
    return Setting(
        tiny.tiny_model("sd2"), [tiny.tiny_conditioning(seed) for seed in range(3)], noise[..., :8, :8]
    )


@pytest.mark.parametrize("name", list(PRESETS))
def test_sld_follows_the_published_loop_over_a_whole_run(text: Any, setting: Setting, name: str) -> None:
    preset = PRESETS[name]

    def published(x: Tensor, directions: list[Tensor], sigma: Tensor, momentum: Any) -> tuple[Tensor, Any]:
        u, p, s = directions
        scale = (torch.abs(p - s) * preset.scale).clamp(max=1.0)
        scale = torch.where((p - s) >= preset.threshold, torch.zeros_like(scale), scale)
        safety = (s - u) * scale + preset.momentum_scale * momentum
        momentum = preset.momentum_decay * momentum + (1 - preset.momentum_decay) * safety
        guidance = p - u
        if sigma <= preset.window.high:
            guidance = guidance - safety
        return x - sigma * (u + SCALE * guidance), momentum

    setting.check(text.sld(setting.model, setting.conds[2], preset), published)


def test_semantic_guidance_follows_the_published_loop_over_a_whole_run(text: Any, setting: Setting) -> None:
    concept = Concept(scale=5, threshold=0.9)
    chosen = SemanticGuidanceSettings((concept,), momentum_scale=0.3, momentum_decay=0.6)

    def published(x: Tensor, directions: list[Tensor], sigma: Tensor, momentum: Any) -> tuple[Tensor, Any]:
        u, p, e = directions
        edit = -concept.scale * (e - u)
        limit = torch.quantile(edit.abs().flatten(2), concept.threshold, dim=2)[:, :, None, None]
        total = (
            torch.where(edit.abs() >= limit, edit, torch.zeros_like(edit)) + chosen.momentum_scale * momentum
        )
        momentum = chosen.momentum_decay * momentum + (1 - chosen.momentum_decay) * total
        noise = u + SCALE * (p - u)
        return x - sigma * (noise + total if sigma <= concept.window.high else noise), momentum

    setting.check(text.sega(setting.model, [setting.conds[2]], chosen), published)


def test_without_strength_no_bit_changes_and_no_model_is_called(host: Any, text: Any) -> None:
    plain, plain_rows = host.count_calls(host.model)
    baseline = host.sample(plain, host.text(STAR))
    for model in (
        text.sld(host.model, host.text("star"), replace(STRONG, scale=0.0)),
        text.sld(
            host.model, host.text("star"), replace(STRONG, window=SigmaWindow(high=1e-6), momentum_scale=0.0)
        ),
        text.sega(host.model, [host.text("star")], SemanticGuidanceSettings((Concept(scale=0.0),))),
    ):
        counted, rows = host.count_calls(model)
        assert torch.equal(host.sample(counted, host.text(STAR)), baseline)
        assert rows == plain_rows


def steps_below(host: Any, sigma: float) -> int:
    """Return those of 10 Karras steps that are at or below a noise level."""
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(host.model.get_model_object("model_sampling"), "karras", 10)[:-1]
    return int((sigmas <= sigma).sum())


def rows_of(host: Any, model: Any, **options: Any) -> list[int]:
    counted, rows = host.count_calls(model)
    host.sample(counted, host.text(STAR), steps=10, sampler="euler", **options)
    return rows


def test_the_text_is_evaluated_only_when_it_matters(host: Any, text: Any) -> None:
    star = host.text("star")
    without_momentum = rows_of(host, text.sld(host.model, star, WEAK))
    assert without_momentum.count(1) == steps_below(host, WEAK.window.high) < 10
    assert without_momentum.count(2) == 10
    assert rows_of(host, text.sld(host.model, star, MEDIUM)).count(1) == 10
    assert rows_of(host, text.sld(host.model, star, MAX)) == [2, 1] * 10
    two = SemanticGuidanceSettings((Concept(), Concept(remove=False)), momentum_scale=0.0)
    rows = rows_of(host, text.sega(host.model, [star, host.text(HEART)], two))
    assert rows.count(2) == 10 + steps_below(host, Concept().window.high)


def test_both_methods_with_the_same_text_evaluate_it_once(host: Any, text: Any) -> None:
    model = text.sld(host.model, host.text("star"), MAX)
    model = text.sega(model, [host.text("star")], SemanticGuidanceSettings((Concept(),)))
    assert rows_of(host, model) == [2, 1] * 10


def test_cfg_1_gets_the_branch_that_the_host_skips(host: Any, text: Any) -> None:
    model = text.sld(host.model, host.text("star"), MAX)
    assert rows_of(host, model, cfg=1.0) == [1, 2] * 10
    baseline = host.sample(host.model, host.text(STAR), cfg=1.0)
    assert not torch.equal(host.sample(model, host.text(STAR), cfg=1.0), baseline)


def test_a_guider_without_a_negative_is_left_alone(host: Any, text: Any) -> None:
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(host.model.get_model_object("model_sampling"), "normal", 3)

    def sampled(model: Any) -> Tensor:
        guider = Guider_Basic(model)
        guider.set_conds(host.text(STAR))
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0, disable_pbar=True)

    assert torch.equal(sampled(text.sld(host.model, host.text("star"), MAX)), sampled(host.model))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s_ancestral"])
def test_momentum_advances_once_per_noise_level(host: Any, text: Any, sampler: str) -> None:
    """The momentum after a run equals a recount over the steps that were new."""
    from safe_guidance.guidance.safe_latent_diffusion import safety_guidance
    from safe_guidance.nodes.host.engine import correction, hooks
    from safe_guidance.nodes.host.methods import safe_latent_diffusion

    seen: list[Any] = []
    states: list[Any] = []

    class Watched(safe_latent_diffusion.SafeLatentDiffusionCorrection):
        def correct(self, step: Any, state: Any) -> Any:
            seen.append(step)
            states.append(state)
            return super().correct(step, state)

    host.sample(
        hooks.attach(host.model, Watched(host.text("star"), STRONG)),
        host.text(STAR),
        steps=4,
        sampler=sampler,
    )
    momentum = torch.zeros_like(seen[0].x)
    for step in seen:
        if step.is_new:
            branches = (
                step.predictions[name]
                for name in (correction.COND, correction.UNCOND, safe_latent_diffusion.SAFETY)
            )
            momentum = safety_guidance(*branches, step.sigma, momentum, STRONG)[1]
    assert len(seen) > sum(step.is_new for step in seen)
    torch.testing.assert_close(states[-1].value, momentum, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s_ancestral"])
def test_semantic_guidances_momentum_advances_once_per_noise_level(host: Any, sampler: str) -> None:
    from safe_guidance.guidance.semantic_guidance import semantic_guidance
    from safe_guidance.nodes.host.engine import correction, hooks
    from safe_guidance.nodes.host.methods.semantic_guidance import SemanticGuidanceCorrection

    chosen = SemanticGuidanceSettings((Concept(scale=2.0),), momentum_scale=0.3, momentum_decay=0.6)
    seen: list[Any] = []
    states: list[Any] = []

    class Watched(SemanticGuidanceCorrection):
        def correct(self, step: Any, state: Any) -> Any:
            seen.append(step)
            states.append(state)
            return super().correct(step, state)

    watched = Watched([host.text("star")], chosen)
    host.sample(hooks.attach(host.model, watched), host.text(STAR), steps=4, sampler=sampler)
    momentum = torch.zeros_like(seen[0].x)
    for step in seen:
        if step.is_new:
            concept, uncond = (
                step.predictions[name].float() for name in (next(iter(watched.texts)), correction.UNCOND)
            )
            momentum = semantic_guidance([concept], uncond, step.sigma, step.level, momentum, chosen)[1]
    assert len(seen) > sum(step.is_new for step in seen)
    torch.testing.assert_close(states[-1].value, momentum, atol=1e-5, rtol=1e-5)


def test_a_run_starts_without_momentum(host: Any, text: Any) -> None:
    model = text.sld(host.model, host.text("star"), STRONG)
    first = host.sample(model, host.text(STAR))
    host.sample(model, host.text(HEART))
    assert torch.equal(host.sample(model, host.text(STAR)), first)


@pytest.mark.parametrize("name", ["SLD", "Semantic Guidance"])
def test_momentum_continues_in_a_resumed_run(
    host: Any, text: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed runs equal one run, except for rounding at the boundaries that a threshold may amplify."""
    from safe_guidance.nodes.host.engine.resume import ResumeStore

    star, concept = host.text("star"), Concept(scale=4.0, window=STRONG.window)
    sega = SemanticGuidanceSettings((concept,), momentum_scale=0.5, momentum_decay=0.7)
    model = text.sld(host.model, star, STRONG) if name == "SLD" else text.sega(host.model, [star], sega)
    whole = host.sample_in_parts(model, host.text(STAR), (0, 10))
    joined = [host.sample_in_parts(model, host.text(STAR), bounds) for bounds in ((0, 2, 10), (0, 4, 7, 10))]
    monkeypatch.setattr(ResumeStore, "find", lambda *_: None)
    forgetful = host.sample_in_parts(model, host.text(STAR), (0, 4, 7, 10))
    assert all((parts - whole).norm() < 0.02 * (forgetful - whole).norm() for parts in joined)


def test_every_part_may_have_a_node_of_its_own(host: Any, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal nodes in two parts of one image continue each other; one with another text does not."""
    from safe_guidance.nodes.host.engine.resume import ResumeStore

    positive, negative = host.text(STAR), host.text("")
    mine, equal, another = (text.sld(host.model, host.text(t), STRONG) for t in ("star", "star", "circle"))

    def part(model: Any, latent: Any, noise: str, start: int, end: int, left: str) -> Any:
        inputs = (model, noise, 1, 4, 5.0, "euler", "karras", positive, negative, latent, start, end, left)
        return host.nodes.KSamplerAdvanced().sample(*inputs)[0]

    half = part(mine, host.empty_latent(), "enable", 0, 2, "enable")
    ends = [part(model, half, "disable", 2, 4, "disable")["samples"] for model in (mine, equal, another)]
    monkeypatch.setattr(ResumeStore, "find", lambda *_: None)
    new = [part(model, half, "disable", 2, 4, "disable")["samples"] for model in (mine, another)]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], new[0])
    assert torch.equal(ends[2], new[1])


def test_samples_of_a_batch_do_not_mix(host: Any, text: Any) -> None:
    """A sample is the same beside any other: momentum, thresholds and quantiles are per sample."""
    model = text.sld(host.model, host.text("star"), STRONG)
    model = text.sega(model, [host.text("circle")], SemanticGuidanceSettings((Concept(scale=2.0),)))
    pair, other = (host.sample(model, host.text(STAR, companion)) for companion in (HEART, STAR))
    assert torch.equal(pair[0], other[0])


def test_inpainting_keeps_what_is_masked(host: Any, text: Any) -> None:
    original = host.sample(host.model, host.text(HEART), seed=4)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    latent = {"samples": original, "noise_mask": mask}
    model = text.sega(
        text.sld(host.model, host.text("star"), MAX),
        [host.text("star")],
        SemanticGuidanceSettings((Concept(),)),
    )
    changed = host.sample(model, host.text(STAR), latent)
    assert not torch.equal(changed, host.sample(host.model, host.text(STAR), latent))
    torch.testing.assert_close(changed[..., 16:], original[..., 16:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_every_family_of_models(host: Any, tiny: ModuleType, text: Any, family: str) -> None:
    model = tiny.tiny_model(family)
    guarded = text.sld(model, tiny.tiny_conditioning(3), MAX)
    guarded = text.sega(guarded, [tiny.tiny_conditioning(4)], SemanticGuidanceSettings((Concept(),)))
    latent = {"samples": torch.zeros(1, tiny.latent_channels(model), 8, 8)}

    def sampled(of: Any) -> Tensor:
        conds = tiny.tiny_conditioning(0), tiny.tiny_conditioning(9)
        return host.nodes.common_ksampler(of, 1, 3, 3.0, "euler", "normal", *conds, latent)[0]["samples"]

    result = sampled(guarded)
    assert torch.isfinite(result).all() and not torch.equal(result, sampled(model))


def test_the_nodes(host: Any) -> None:
    from safe_guidance.nodes.safe_latent_diffusion import SafeLatentDiffusionNode, settings_from
    from safe_guidance.nodes.semantic_guidance import SemanticConceptNode, SemanticGuidanceNode

    own = dict(scale=9.0, threshold=0.5, momentum_scale=0.0, momentum_decay=0.0, start_sigma=1000.0)
    assert settings_from("strong", **own) == STRONG
    assert settings_from("custom", **own) == SafeLatentDiffusionSettings(9.0, 0.5, 0.0, 0.0, SigmaWindow())
    with pytest.raises(ValueError, match="no CLIP"):
        SafeLatentDiffusionNode.execute(host.model, None, "medium", "star", **own)
    shape = dict(scale=5.0, threshold=0.9, start_sigma=4.69, end_sigma=0.0)
    momentum = dict(momentum_scale=0.1, momentum_decay=0.4)
    with pytest.raises(ValueError, match="no concept"):
        SemanticGuidanceNode.execute(host.model, host.clip, " \n", "", **momentum, **shape)
    with pytest.raises(ValueError, match="no text"):
        SemanticConceptNode.execute(" ", "remove", 1.0, **shape)
    chain = SemanticConceptNode.execute("star", "remove", 1.0, **shape).args[0]
    chain = SemanticConceptNode.execute("heart", "add", 0.5, concepts=chain, **shape).args[0]
    separate = SemanticGuidanceNode.execute(
        host.model, host.clip, "", "", **momentum, **shape, concepts=chain[:1]
    ).args[0]
    inline = SemanticGuidanceNode.execute(host.model, host.clip, "star", "", **momentum, **shape).args[0]
    prompt = host.text(STAR)
    assert torch.equal(host.sample(separate, prompt), host.sample(inline, prompt))
    assert [(n.text, n.concept.remove, n.concept.weight) for n in chain] == [
        ("star", True, 1.0),
        ("heart", False, 0.5),
    ]
