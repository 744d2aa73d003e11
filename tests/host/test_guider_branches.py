"""The guider's own branches, whatever other nodes evaluate in the same forward.

A text that equals the negative prompt gives the negative branch's prediction, so guidance away from it
changes nothing. Any other prediction in the branch's place shows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from demo_prompts import HEART, STAR
from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.safe_latent_diffusion import MAX
from safe_guidance.guidance.semantic_guidance import Concept, SemanticGuidanceSettings

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

SMALL = 1e-4
"""Share of the latent's norm: a text alone is evaluated in another batch size, which rounds differently."""


@pytest.fixture
def methods(host: Any) -> dict[str, Callable[[Any, list[Any]], Any]]:
    """Attach a method that guides away from a text, by the method's name."""
    from safe_guidance.nodes.host.engine.hooks import attach
    from safe_guidance.nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection
    from safe_guidance.nodes.host.methods.semantic_guidance import SemanticGuidanceCorrection

    every_element = Concept(scale=5.0, threshold=0.0, window=SigmaWindow())
    return {
        "SLD": lambda model, text: attach(model, SafeLatentDiffusionCorrection(text, MAX)),
        "Semantic Guidance": lambda model, text: attach(
            model, SemanticGuidanceCorrection([text], SemanticGuidanceSettings((every_element,)))
        ),
    }


def self_attention_guidance(host: Any, model: Any) -> Any:
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]


def perturbed_attention_guidance(host: Any, model: Any) -> Any:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 3.0).args[0]


def perpendicular_negative(host: Any, model: Any) -> Any:
    from comfy_extras.nodes_perpneg import PerpNeg

    # The node evaluates a text of its own from a CFG function.
    return PerpNeg.execute(model, host.text(HEART), 1.0).args[0]


def perturbed_first(host: Any, model: Any) -> Any:
    """A pack that evaluates both branches with damaged latents and patched options before the guider does."""
    import comfy.model_patcher
    import comfy.samplers

    def damaged(args: dict[str, Any]) -> Any:
        inputs = args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        options = comfy.model_patcher.set_model_options_patch_replace(
            args["model_options"].copy(), lambda q, k, v, _: v, "attn1", "middle", 0
        )
        comfy.samplers.calc_cond_batch(*inputs[:4], options)
        comfy.samplers.calc_cond_batch(inputs[0], inputs[1], 0.5 * inputs[2], *inputs[3:])
        return comfy.samplers.calc_cond_batch(*inputs)

    patched = model.clone()
    patched.set_model_sampler_calc_cond_batch_function(damaged)
    return patched


OTHERS: dict[str, Callable[[Any, Any], Any]] = {
    "nothing": lambda host, model: model,
    "self-attention guidance": self_attention_guidance,
    "perturbed-attention guidance": perturbed_attention_guidance,
    "perpendicular negative": perpendicular_negative,
    "evaluates before the guider": perturbed_first,
}


@pytest.mark.parametrize("other", ["nothing", "self-attention guidance"])
@pytest.mark.parametrize("method", ["SLD", "Semantic Guidance"])
def test_the_negative_prompt_as_unwanted_text_changes_nothing(
    host: Any, methods: Any, other: str, method: str
) -> None:
    model = OTHERS[other](host, host.model)
    plain = host.sample(model, host.text(STAR), steps=2)
    same = host.sample(methods[method](model, host.text("")), host.text(STAR), steps=2)
    away = host.sample(methods[method](model, host.text("star")), host.text(STAR), steps=2)
    assert (same - plain).norm() <= SMALL * plain.norm()
    assert (away - plain).norm() > 100 * SMALL * plain.norm()


def branches_of(host: Any, model: Any, steps: int = 2, **options: Any) -> tuple[list[Any], list[int]]:
    """Return the steps that a method saw, which asks for both branches, and the rows of every model call."""
    from safe_guidance.nodes.host.engine.correction import COND, UNCOND, Correction
    from safe_guidance.nodes.host.engine.hooks import attach

    class Asks(Correction):
        def __init__(self) -> None:
            self.seen: list[tuple[Any, dict[str, Tensor]]] = []

        def is_active(self, level: Any) -> bool:
            return True

        def wanted_texts(self, step: Any, state: None) -> dict[str, Tensor]:
            return {COND: step.every_row, UNCOND: step.every_row}

        def correct(self, step: Any, state: None) -> None:
            self.seen.append((step, alone(step)))

    def alone(step: Any) -> dict[str, Tensor]:
        """Both branches as the model predicts them, without any other node's patches."""
        import comfy.samplers

        sigmas = step.model_options["transformer_options"]["sample_sigmas"]
        options = {"transformer_options": {"sample_sigmas": sigmas}}
        conds = [step.guider.conds[name] for name in (COND, UNCOND)]
        found = comfy.samplers.calc_cond_batch(step.guider.inner_model, conds, step.x, step.timestep, options)
        return dict(zip((COND, UNCOND), found))

    asks = Asks()
    counted, rows = host.count_calls(attach(model, asks))
    host.sample(counted, host.text(STAR), steps=steps, sampler="euler", **options)
    return asks.seen, rows


@pytest.mark.parametrize("other", OTHERS)
def test_the_branches_are_those_of_the_prompts(host: Any, other: str) -> None:
    seen, _ = branches_of(host, OTHERS[other](host, host.model))
    assert len(seen) == 2
    for step, alone in seen:
        for name, expected in alone.items():
            torch.testing.assert_close(step.predictions[name], expected, atol=1e-3, rtol=0)


def in_context_windows(model: Any, dim: int, length: int) -> Any:
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    settings = ("standard_static", 1, False, "pyramid", dim, False)
    return ContextWindowsManualNode.execute(model, length, 0, *settings, causal_window_fix=False).args[0]


@pytest.mark.parametrize("dim", [0, 3])
def test_context_windows_are_evaluated_once_and_the_branches_fused(
    host: Any, dim: int, shown: dict[str, str]
) -> None:
    """The host evaluates every window on copies of the prompts; no branch is evaluated again for a method."""
    batch = {"samples": torch.zeros(4 if dim == 0 else 1, 4, 32, 32)}
    model = in_context_windows(host.model, dim, 2 if dim == 0 else 16)
    counted, plain = host.count_calls(model)
    host.sample(counted, host.text(STAR), batch, steps=2, sampler="euler")
    seen, rows = branches_of(host, model, latent=batch)
    own = sum(plain)
    assert sum(rows) == own and own == (16 if dim == 0 else 8)
    for step, alone in seen:
        guided = step.predictions["negative"] + 5.0 * (
            step.predictions["positive"] - step.predictions["negative"]
        )
        torch.testing.assert_close(guided, step.denoised, atol=1e-3, rtol=0)
        if dim == 0:
            torch.testing.assert_close(step.predictions["negative"], alone["negative"], atol=1e-3, rtol=0)


def test_a_negative_that_is_skipped_late_is_not_told_as_cfg_1(
    host: Any, methods: Any, shown: dict[str, str]
) -> None:
    from comfy_execution.utils import CurrentNodeContext

    def without_negative_late(args: dict[str, Any]) -> Any:
        import comfy.samplers

        positive, negative = args["conds"]
        conds = [positive, negative if float(args["sigma"][0]) > 1 else None]
        out = comfy.samplers.calc_cond_batch(
            args["model"], conds, args["input"], args["sigma"], args["model_options"]
        )
        return out if conds[1] is not None else [out[0], out[0]]

    patched = host.model.clone()
    patched.set_model_sampler_calc_cond_batch_function(without_negative_late)
    with CurrentNodeContext("prompt", "7"):
        model = methods["SLD"](patched, host.text("star"))
    host.sample(model, host.text(STAR), steps=3)
    assert "CFG is 1" not in shown["7"] and "left the negative prompt out" in shown["7"]
