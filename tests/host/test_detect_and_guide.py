"""Detect-and-Guide in the real host: cost, which samples it changes, and errors for unsuitable tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from demo_prompts import HEART, STAR
from safe_guidance.guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


@pytest.fixture(scope="module")
def stars(host: Any) -> GuidelineTokens:
    """Return the bundled tokens."""
    from safe_guidance.formats import guideline_token_file
    from safe_guidance.nodes.host.files.folders import GUIDELINE_TOKENS, file_path

    return guideline_token_file.load(file_path(GUIDELINE_TOKENS, "demo_star (bundled)"))


def always(tokens: GuidelineTokens) -> GuidelineTokens:
    """Return tokens that detect something in every image."""
    return replace(tokens, calibration=MapCalibration(0.011, 0.0))


def never(tokens: GuidelineTokens) -> GuidelineTokens:
    return replace(tokens, calibration=MapCalibration(0.989, 0.0))


def guarded(host: Any, tokens: GuidelineTokens, model: Any = None, **inputs: Any) -> Any:
    """Return the demo model with the node applied, with its defaults except for the given settings."""
    from safe_guidance.nodes.detect_and_guide import DAGDetectorGuideNode

    defaults = {
        i.id: i.default
        for i in DAGDetectorGuideNode.define_schema().inputs
        if getattr(i, "default", None) is not None
    }
    safety = inputs.pop("safety", None) or host.text("a star")
    result = DAGDetectorGuideNode.execute(
        model=model or host.model, guideline_tokens=tokens, safety=safety, **{**defaults, **inputs}
    )
    return result.args[0]


EAGER = {"coverage": 1.01, "start_sigma": 1000.0}


def test_a_closed_gate_costs_nothing_and_changes_no_bit(host: Any, stars: GuidelineTokens) -> None:
    text = host.text(STAR, HEART)
    plain, plain_rows = host.count_calls(host.model)
    baseline = host.sample(plain, text)
    for tokens, settings in (
        (never(stars), {}),
        (always(stars), {"strength": 0.0}),
        (always(stars), {"start_sigma": 0.001}),
    ):
        model, rows = host.count_calls(guarded(host, tokens, **settings))
        assert torch.equal(host.sample(model, text), baseline)
        assert rows == plain_rows


def test_only_detected_samples_cost_and_change(host: Any, stars: GuidelineTokens) -> None:
    """The threshold lies between the highest map values of two samples, so only one needs the safety text."""
    from safe_guidance.nodes.host.attention.detection_maps import detect

    text = host.text(STAR, HEART)
    baseline = host.sample(host.model, text, steps=6)
    levels = (5.0, 2.0)
    maps = detect(host.model, replace(stars, calibration=MapCalibration()), text, baseline, levels, seed=0)
    assert maps.shape == (2, 2, 32, 32)
    model, rows = host.count_calls(guarded(host, stars))
    found = host.sample(model, text, steps=6)
    assert [torch.equal(a, b) for a, b in zip(found, baseline)] == [False, True]
    assert set(rows) == {4, 1} and rows.count(4) == 6 and 1 <= rows.count(1) <= 6


def test_a_triggered_step_costs_one_more_evaluation(host: Any, stars: GuidelineTokens) -> None:
    model, rows = host.count_calls(guarded(host, always(stars), **EAGER))
    changed = host.sample(model, host.text(STAR), steps=4)
    assert rows == [2, 1] * 4
    assert not torch.equal(changed, host.sample(host.model, host.text(STAR), steps=4))


def test_the_warm_up_is_left_alone(host: Any, stars: GuidelineTokens) -> None:
    model, rows = host.count_calls(guarded(host, always(stars), coverage=1.01))
    host.sample(model, host.text(STAR), steps=10)
    sigmas = host_sigmas(host, 10)
    expected = [part for sigma in sigmas[:-1] for part in ([2, 1] if sigma <= 7.56 * 1.001 else [2])]
    assert rows == expected


def host_sigmas(host: Any, steps: int) -> list[float]:
    import comfy.samplers

    return comfy.samplers.KSampler(host.model, steps, "cpu", "dpmpp_2m", "karras", 1.0).sigmas.tolist()


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_sde", "lcm", "uni_pc"])
def test_works_under_every_kind_of_sampler(host: Any, stars: GuidelineTokens, sampler: str) -> None:
    text = host.text(STAR)
    found = host.sample(guarded(host, always(stars), **EAGER), text, sampler=sampler, steps=3)
    assert torch.isfinite(found).all() and not torch.equal(
        found, host.sample(host.model, text, sampler=sampler, steps=3)
    )


def test_masks_say_where_to_look_and_act(host: Any, stars: GuidelineTokens) -> None:
    text = host.text(STAR)
    baseline = host.sample(host.model, text, steps=3)
    everywhere = host.sample(guarded(host, always(stars), **EAGER), text, steps=3)
    ones = host.sample(guarded(host, always(stars), mask=torch.ones(1, 40, 56), **EAGER), text, steps=3)
    nowhere = host.sample(guarded(host, always(stars), mask=torch.zeros(1, 40, 56), **EAGER), text, steps=3)
    assert (
        torch.equal(ones, everywhere)
        and torch.equal(nowhere, baseline)
        and not torch.equal(everywhere, baseline)
    )


def test_a_mask_confines_the_first_change(host: Any, stars: GuidelineTokens) -> None:
    """One Euler step from the start: outside the mask the denoised prediction is the plain one."""
    left = torch.zeros(1, 32, 32)
    left[..., :16] = 1
    options = {"sampler": "euler", "steps": 1}
    text = host.text(STAR)
    baseline = host.sample(host.model, text, **options)
    masked = host.sample(guarded(host, always(stars), mask=left, **EAGER), text, **options)
    assert torch.equal(masked[..., 16:], baseline[..., 16:]) and not torch.equal(
        masked[..., :16], baseline[..., :16]
    )


def test_inpainting_keeps_what_is_masked(host: Any, stars: GuidelineTokens) -> None:
    original = host.sample(host.model, host.text(HEART), seed=4)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    latent = {"samples": original, "noise_mask": mask}
    changed = host.sample(guarded(host, always(stars), **EAGER), host.text(STAR), latent)
    torch.testing.assert_close(changed[..., 16:], original[..., 16:], atol=1e-5, rtol=1e-5)


def test_odd_sizes_and_areas(host: Any, stars: GuidelineTokens) -> None:
    latent = host.empty_latent(1, 152, 104)
    star, heart = host.text(STAR), host.text(HEART)
    halves = [[star[0][0], {"area": (26, 20, 0, 0)}], [heart[0][0], {"area": (26, 18, 0, 20)}]]
    for positive in (star, halves):
        found = host.sample(guarded(host, always(stars), **EAGER), positive, latent, steps=2)
        assert torch.isfinite(found).all() and not torch.equal(
            found, host.sample(host.model, positive, latent, steps=2)
        )


def test_several_concepts_act_as_their_maximum(host: Any, stars: GuidelineTokens) -> None:
    text = host.text(STAR)
    alone = host.sample(guarded(host, always(stars), **EAGER), text, steps=3)
    assert torch.equal(
        host.sample(guarded(host, never(stars), guideline_tokens_2=always(stars), **EAGER), text, steps=3),
        alone,
    )
    assert torch.equal(
        host.sample(guarded(host, always(stars), guideline_tokens_3=always(stars), **EAGER), text, steps=3),
        alone,
    )


def test_other_methods_and_a_second_detector_add_up_in_any_order(host: Any, stars: GuidelineTokens) -> None:
    text = host.text(STAR)
    first, second = {"strength": 0.5}, {"strength": 1.5, "host_mask": "SLD"}

    def sampled(*order: dict[str, Any]) -> torch.Tensor:
        model = host.model
        for settings in order:
            model = guarded(host, always(stars), model=model, **EAGER, **settings)
        return host.sample(model, text, steps=2)

    assert torch.equal(sampled(first, second), sampled(second, first))
    assert not torch.equal(sampled(first, second), sampled(first))


def test_cfg_1_evaluates_the_negative_only_for_what_is_detected(host: Any, stars: GuidelineTokens) -> None:
    model, rows = host.count_calls(guarded(host, always(stars), **EAGER))
    host.sample(model, host.text(STAR), cfg=1.0, steps=3)
    assert rows == [1, 2] * 3


def test_a_guider_without_a_negative_prompt_stays_unchanged_with_a_warning(
    host: Any, stars: GuidelineTokens, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    sigmas = comfy.samplers.calculate_sigmas(host.model.get_model_object("model_sampling"), "normal", 2)
    latent = torch.zeros(1, 4, 32, 32)

    def sampled(model: Any) -> torch.Tensor:
        guider = Guider_Basic(model)
        guider.set_conds(host.text(STAR))
        return guider.sample(
            comfy.sample.prepare_noise(latent, 3),
            latent,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            seed=3,
            disable_pbar=True,
        )

    assert torch.equal(sampled(guarded(host, always(stars), **EAGER)), sampled(host.model))
    assert "needs a negative prompt" in caplog.text


def test_stacked_maps_are_the_mean_of_the_steps(host: Any, stars: GuidelineTokens) -> None:
    text = host.text(STAR)
    varied = replace(stars, calibration=MapCalibration(0.3))
    single, stacked = (
        host.sample(guarded(host, varied, stacked=s, base=50.0, **EAGER), text, steps=4)
        for s in (False, True)
    )
    assert not torch.equal(single, stacked)
    one_step = [
        host.sample(guarded(host, always(stars), stacked=s, **EAGER), text, steps=1) for s in (False, True)
    ]
    assert torch.equal(*one_step)


def test_bounded_changes_keep_the_values_that_the_prediction_had(host: Any, stars: GuidelineTokens) -> None:
    """With one Euler step to the end, the result is the corrected prediction."""
    text, options = host.text(STAR), {"sampler": "euler", "steps": 1}
    plain = host.sample(host.model, text, **options)
    free, bounded = (
        host.sample(
            guarded(host, always(stars), bounded=b, base=1000.0, quantile=0.0, **EAGER), text, **options
        )
        for b in (False, True)
    )
    low, high = plain.amin((2, 3), keepdim=True), plain.amax((2, 3), keepdim=True)
    outside = [((x < low - 1e-3) | (x > high + 1e-3)).any().item() for x in (free, bounded)]
    assert outside == [True, False] and not torch.equal(bounded, plain)


def test_two_passes_keep_the_image_away_from_the_subject(host: Any, stars: GuidelineTokens) -> None:
    text = host.text(STAR, HEART)
    plain = host.sample(host.model, text, steps=8)
    model, rows = host.count_calls(
        guarded(host, stars, look_first=True, detection_threshold=0.42, core=0.7, reach=0.1, base=400.0)
    )
    found = host.sample(model, text, steps=8)
    assert torch.equal(found[1], plain[1])
    changed = (found[0] != plain[0]).any(0)
    # The star is in the centre of the image.
    assert bool(changed[10:22, 10:22].any()) and not bool(changed[:4].any() | changed[-4:].any())
    assert changed.float().mean() < 0.3
    # Two runs of CFG, and the safety text for the star at every step of the second one past the warm-up.
    guided = sum(sigma <= 7.56 for sigma in host_sigmas(host, 8)[:-1])
    assert sum(rows) == 8 * 4 * 2 + guided and rows[:8] == [4] * 8


def test_two_passes_act_with_the_same_scale_at_every_step(host: Any, stars: GuidelineTokens) -> None:
    """The map of the first pass does not fade while the subject is removed."""
    from safe_guidance.nodes.host.engine.hooks import trace_of

    model = guarded(host, always(stars), look_first=True, **EAGER)
    trace = trace_of(model, host.sample(model, host.text(STAR), steps=5))
    assert (
        len({record.gate for record in trace.records}) == 1 == len({record.area for record in trace.records})
    )
    assert trace.rehearsal == 10


def test_two_passes_without_a_detection_cost_nothing(host: Any, stars: GuidelineTokens) -> None:
    text = host.text(STAR)
    plain, plain_rows = host.count_calls(host.model)
    baseline = host.sample(plain, text)
    model, rows = host.count_calls(guarded(host, never(stars), look_first=True))
    assert torch.equal(host.sample(model, text), baseline) and rows == plain_rows


def test_models_whose_attention_cannot_be_read_raise_an_error(
    host: Any, stars: GuidelineTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = host.model.clone()
    monkeypatch.setitem(model.model._modules, "diffusion_model", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="DAG cannot read the attention of this model .* Use Safe Den"):
        guarded(host, stars, model=model)


def test_tokens_of_another_model_raise_an_error(host: Any, tiny: Any, stars: GuidelineTokens) -> None:
    with pytest.raises(ValueError, match="96 wide, the model's text embeddings 32"):
        guarded(host, stars, model=tiny.tiny_model("sd1"))
    with pytest.raises(ValueError, match="were made for DemoModelConfig, the model is TinySDXL"):
        guarded(host, replace(stars, embeddings=torch.zeros(2, tiny.WIDTH)), model=tiny.tiny_model("sdxl"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_unet_family_is_guided(host: Any, tiny: Any, family: str) -> None:
    import comfy.sample

    tokens = GuidelineTokens(
        torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(1)),
        calibration=MapCalibration(0.011),
    )
    noise = torch.randn(1, 4, 17, 24, generator=torch.Generator().manual_seed(0))

    def sampled(model: Any) -> torch.Tensor:
        conds = tiny.tiny_conditioning(1), tiny.tiny_conditioning(2)
        return comfy.sample.sample(
            model,
            noise,
            2,
            5.0,
            "euler",
            "normal",
            *conds,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=1,
        )

    model = tiny.tiny_model(family)
    safe = guarded(host, tokens, model=model, safety=tiny.tiny_conditioning(3), **EAGER)
    plain = sampled(model)
    assert torch.isfinite(sampled(safe)).all() and not torch.equal(sampled(safe), plain)
    left = torch.zeros(1, 17, 24)
    left[..., :12] = 1
    looked = sampled(
        guarded(
            host, tokens, model=model, safety=tiny.tiny_conditioning(3), mask=left, look_first=True, **EAGER
        )
    )
    assert torch.equal(looked[..., 12:], plain[..., 12:]) and not torch.equal(
        looked[..., :12], plain[..., :12]
    )
