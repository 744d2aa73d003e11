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
from ..reports.safety_scores import verdicts
from .host.autograd.auxiliary_models import assess
from .host.engine.hooks import trace_of, unguarded
from .host.engine.ksampler import sample
from .host.engine.node_messages import message_ui
from .io_types import SafetyFunctionType, SafetyTraceType
from .model_inputs import prompt_inputs
from .shared_inputs import changing_seed_input, sampler_inputs


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
                    tooltip="Model with the safety methods attached. The unguarded image is made with the "
                    "same model without them.",
                ),
                *prompt_inputs(),
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
        def decoded(of: ModelPatcher, prompt: list[Any]) -> tuple[Tensor, Tensor]:
            latent = sample(
                of, seed, steps, cfg, sampler_name, scheduler, prompt, negative, latent_image, denoise
            )
            return latent["samples"], vae.decode(latent["samples"])

        samples, guarded = decoded(model, positive)
        trace = trace_of(model, samples)
        _, bare = decoded(unguarded(model), positive if unguarded_positive is None else unguarded_positive)
        differences = compare(guarded, bare)
        sides = {} if safety_function is None else {"guarded": guarded, "unguarded": bare}
        judged = {side: verdicts(assess(safety_function, images)) for side, images in sides.items()}
        change = amplified(guarded, bare)
        if blur_unguarded:
            bare, change = blurred(bare), blurred(change)
        report = json.dumps(report_data(differences, trace, judged))
        shown = message_ui(report_text(differences, trace, judged))
        return io.NodeOutput(guarded, bare, change, report, trace, ui=shown)


NODES: list[type[io.ComfyNode]] = [GuardedAndUnguardedNode]
