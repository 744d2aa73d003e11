"""Guarded and Unguarded: both images are the ones that separate samplers give, and the measures are what
they say.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from demo_prompts import HEART, STAR
from safe_guidance.guidance.safe_latent_diffusion import MAX
from safe_guidance.guidance.safety_functions.interface import Assessment, SafetyFunction

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

SAMPLING = dict(seed=3, steps=4, cfg=5.0, sampler_name="euler", scheduler="karras", denoise=1.0)


@pytest.fixture
def twin(host: Any) -> Any:
    from safe_guidance.nodes.compare_guarded import GuardedAndUnguardedNode
    from safe_guidance.nodes.host.engine.hooks import attach, unguarded
    from safe_guidance.nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection
    from safe_guidance.reports import image_difference

    def run(model: Any, blur: bool = False, **options: Any) -> tuple[Any, ...]:
        args = (model, host.text(STAR), host.text(""), host.empty_latent(), host.vae)
        return GuardedAndUnguardedNode.execute(*args, **SAMPLING, blur_unguarded=blur, **options).args

    def sld(model: Any) -> Any:
        return attach(model, SafeLatentDiffusionCorrection(host.text("star"), MAX))

    return SimpleNamespace(run=run, sld=sld, unguarded=unguarded, image_difference=image_difference)


def separate(host: Any, model: Any, prompt: str = STAR) -> torch.Tensor:
    options = dict(seed=3, steps=4, cfg=5.0, sampler="euler", scheduler="karras")
    return host.vae.decode(host.sample(model, host.text(prompt), **options))


def test_both_images_are_those_of_separate_samplers(host: Any, twin: Any) -> None:
    guarded = twin.sld(host.model)
    a, b, difference, text, trace = twin.run(guarded)
    assert torch.equal(a, separate(host, guarded)) and torch.equal(b, separate(host, host.model))
    report = json.loads(text)
    assert report["identical"] == [False] and report["trace"]["methods"] == ["SLD"] == list(trace.methods)
    assert report["differences"][0]["mean_change"] == pytest.approx((a - b).abs().mean().item(), rel=1e-4)
    assert difference.max() == 1 and torch.argmax(difference) == torch.argmax((a - b).abs())


def test_without_guidance_the_images_are_identical(host: Any, twin: Any) -> None:
    a, b, difference, text, trace = twin.run(host.model)
    assert torch.equal(a, b) and not difference.any() and trace is None
    assert json.loads(text)["identical"] == [True]
    assert json.loads(text)["differences"][0] == {
        "mean_change": 0.0,
        "changed_area": 0.0,
        "ssim": pytest.approx(1.0, abs=1e-4),
    }


def test_the_unguarded_side_is_blurred_unless_asked(host: Any, twin: Any) -> None:
    guarded = twin.sld(host.model)
    sharp, soft = twin.run(guarded), twin.run(guarded, blur=True)
    assert torch.equal(sharp[0], soft[0]) and soft[1].shape == sharp[1].shape

    def detail(images: torch.Tensor) -> float:
        return (images[:, 1:] - images[:, :-1]).abs().mean().item()

    assert detail(soft[1]) < 0.5 * detail(sharp[1]) and detail(soft[2]) < detail(sharp[2])
    differences = [json.loads(side[3])["differences"] for side in (sharp, soft)]
    assert differences[0] == differences[1]


def test_the_unguarded_side_may_have_a_prompt_of_its_own(host: Any, twin: Any) -> None:
    _, b, *_ = twin.run(host.model, unguarded_positive=host.text(HEART))
    assert torch.equal(b, separate(host, host.model, HEART))


def test_a_safety_function_judges_both(host: Any, twin: Any) -> None:
    class Brightness(SafetyFunction):
        name = "brightness"

        def __call__(self, images: torch.Tensor) -> Assessment:
            score = images.flatten(1).mean(1)
            return Assessment(score, score > 0.0, [{"mean": value} for value in score.tolist()])

    a, b, _, text, _ = twin.run(twin.sld(host.model), safety_function=Brightness())
    judged = json.loads(text)["verdicts"]
    assert judged["guarded"][0]["score"] == pytest.approx(a.mean().item(), rel=1e-4)
    assert (
        judged["unguarded"][0]["score"] == pytest.approx(b.mean().item(), rel=1e-4)
        and judged["guarded"][0]["unsafe"]
    )


def test_unguarded_keeps_what_came_after_the_guidance(host: Any, twin: Any) -> None:
    """A patch that was added to the guarded model applies to both images."""
    patched = twin.sld(host.model)
    patched.set_model_sampler_post_cfg_function(lambda args: 0.5 * args["denoised"])
    assert not torch.equal(separate(host, twin.unguarded(patched)), separate(host, host.model))
    halved = host.model.clone()
    halved.set_model_sampler_post_cfg_function(lambda args: 0.5 * args["denoised"])
    assert torch.equal(separate(host, twin.unguarded(patched)), separate(host, halved))


def test_measures_against_their_definitions(twin: Any) -> None:
    a = torch.zeros(1, 40, 40, 3)
    b = a.clone()
    b[:, :10, :, 1] = 0.5
    found = twin.image_difference.compare(a, b)[0]
    assert found.mean_change == pytest.approx(0.5 * 0.25 / 3) and found.changed_area == pytest.approx(0.25)
    same = twin.image_difference.compare(b, b)[0]
    assert same.ssim == pytest.approx(1.0, abs=1e-4) and found.ssim < same.ssim
    assert twin.image_difference.compare(a, a + 1 / 255)[0].changed_area == 0
    assert twin.image_difference.blurred(b).shape == b.shape
