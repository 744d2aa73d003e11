"""Guarded and Unguarded: the same image with and without the corrections, compared."""

from __future__ import annotations

import json
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..guidance.safety_functions.interface import SafetyFunction
from ..reports.guarded_report import report_data, report_text
from ..reports.image_difference import amplified, blurred, compare
from .host.autograd.auxiliary_models import load_now
from .host.engine.hooks import trace_of, unguarded
from .host.engine.ksampler import sample
from .host.engine.node_messages import message_ui
from .io_types import SafetyFunctionType, SafetyTraceType
from .shared_inputs import changing_seed_input, sampler_inputs


def verdicts(safety_function: SafetyFunction, images: Tensor) -> list[dict[str, Any]]:
    """Return a safety function's score, decision and explanation for each image (B, H, W, 3)."""
    device = load_now(safety_function)
    found = safety_function(images[..., :3].movedim(-1, 1).float().to(device))
    pairs = zip(found.score.tolist(), found.gate.tolist(), found.explanation)
    return [
        {"score": score, "unsafe": gate, "explanation": explanation} for score, gate, explanation in pairs
    ]


class GuardedAndUnguardedNode(io.ComfyNode):
    """Samples one image with and one without the corrections, from the same seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceGuardedAndUnguarded",
            display_name="Guarded and Unguarded",
            category="safe guidance/evidence",
            description="Samples the same image twice, with and without the safety methods attached "
            "to the MODEL, and shows how the two differ.",
            search_aliases=["compare", "before and after", "twin run", "difference", "evidence", "ksampler"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The guarded model. The unguarded image is made with the same model without "
                    "the safety methods.",
                ),
                io.Conditioning.Input("positive", tooltip="Positive prompt: what the image should show."),
                io.Conditioning.Input(
                    "negative", tooltip="Negative prompt: what the image should not show, in words."
                ),
                io.Latent.Input(
                    "latent_image", tooltip="Latent image to start from: an empty one, or an encoded image."
                ),
                io.Vae.Input("vae", tooltip="VAE of the model. It decodes both images."),
                *sampler_inputs(changing_seed_input("Random seed of both images.")),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Amount of denoising: 1 starts from pure noise. A lower value keeps more of "
                    "the input image.",
                ),
                io.Boolean.Input(
                    "blur_unguarded",
                    default=True,
                    tooltip="Blur the unguarded image and the difference, so that nobody has to see "
                    "what was avoided. All measures use the sharp images.",
                ),
                io.Conditioning.Input(
                    "unguarded_positive",
                    optional=True,
                    tooltip="Positive prompt of the unguarded image. Connect it when the guarded prompt "
                    "went through SAFREE Text Filter.",
                ),
                SafetyFunctionType.Input(
                    "safety_function", optional=True, tooltip="Safety function that scores both images."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="guarded"),
                io.Image.Output(display_name="unguarded"),
                io.Image.Output(
                    display_name="difference",
                    tooltip="Where the two images differ; the largest difference is white.",
                ),
                io.String.Output(
                    display_name="report", tooltip="All measures, scores and the trace as JSON."
                ),
                SafetyTraceType.Output(display_name="trace"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        negative: list[Any],
        latent_image: dict[str, Any],
        vae: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        blur_unguarded: bool,
        unguarded_positive: list[Any] | None = None,
        safety_function: SafetyFunction | None = None,
    ) -> io.NodeOutput:
        def sampled(of: ModelPatcher, prompt: list[Any]) -> Tensor:
            latent = sample(
                of, seed, steps, cfg, sampler_name, scheduler, prompt, negative, latent_image, denoise
            )
            samples: Tensor = latent["samples"]
            return samples

        samples = sampled(model, positive)
        trace = trace_of(model, samples)
        guarded = vae.decode(samples)
        bare = vae.decode(
            sampled(unguarded(model), positive if unguarded_positive is None else unguarded_positive)
        )
        differences = compare(guarded, bare)
        judged = {}
        if safety_function is not None:
            judged = {
                "guarded": verdicts(safety_function, guarded),
                "unguarded": verdicts(safety_function, bare),
            }
        change = amplified(guarded, bare)
        if blur_unguarded:
            bare, change = blurred(bare), blurred(change)
        text = json.dumps(report_data(differences, trace, judged))
        shown = message_ui(report_text(differences, trace, judged))
        return io.NodeOutput(guarded, bare, change, text, trace, ui=shown)


NODES: list[type[io.ComfyNode]] = [GuardedAndUnguardedNode]
