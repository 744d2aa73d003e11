"""Guarded and Unguarded: the same image with and without the corrections, and how they differ."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..guidance.safety_functions.interface import SafetyFunction
from ..reports.image_difference import Difference, amplified, blurred, compare
from ..reports.trace import Trace, in_words
from .host.autograd.decoders import load_now
from .host.engine.hooks import trace_of, unguarded
from .host.engine.ksampler import sample
from .host.engine.node_messages import message_ui
from .io_types import SafetyFunctionType, SafetyTraceType
from .shared_inputs import changing_seed_input, sampler_inputs


def verdicts(safety_function: SafetyFunction, images: Tensor) -> list[dict[str, Any]]:
    """What a safety function says about each image (B, H, W, 3)."""
    device = load_now(safety_function)
    found = safety_function(images[..., :3].movedim(-1, 1).float().to(device))
    pairs = zip(found.score.tolist(), found.gate.tolist(), found.explanation)
    return [
        {"score": score, "unsafe": gate, "explanation": explanation} for score, gate, explanation in pairs
    ]


def report(differences: list[Difference], trace: Trace | None, judged: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, for JSON."""
    return {
        "version": 1,
        "identical": [difference.mean_change == 0 for difference in differences],
        "differences": [asdict(difference) for difference in differences],
        "verdicts": judged,
        "trace": None if trace is None else trace.to_dict(),
    }


def told(differences: list[Difference], trace: Trace | None, judged: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for index, d in enumerate(differences):
        changed = f"mean change {d.mean_change:.2%}, changed area {d.changed_area:.0%}, SSIM {d.ssim:.3f}"
        lines.append(f"Image {index + 1}: " + ("identical" if d.mean_change == 0 else changed))
        for side, of_side in judged.items():
            lines.append(
                f"  {side}: "
                + ("unsafe" if of_side[index]["unsafe"] else "safe")
                + f", score {of_side[index]['score']:.3f}"
            )
    if trace is not None:
        lines.append(in_words(trace))
    return "\n".join(lines)


class GuardedAndUnguarded(io.ComfyNode):
    """Two samplers with the same seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceGuardedAndUnguarded",
            display_name="Guarded and Unguarded",
            category="safe guidance/evidence",
            description="Samples the same image twice, with and without the safe guidance on the MODEL, and shows how they differ.",
            search_aliases=["compare", "before and after", "twin run", "difference", "evidence", "ksampler"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The guarded model. The unguarded image is made with the same one without its guidance.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What the text says it should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to start from."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                *sampler_inputs(changing_seed_input("The random seed of both images.")),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Less than 1 starts from the latent's image. Less changes less of it.",
                ),
                io.Boolean.Input(
                    "blur_unguarded",
                    default=True,
                    tooltip="Blur the unguarded image and the difference, so that nobody has to look at what was avoided. All figures "
                    "are of the sharp ones.",
                ),
                io.Conditioning.Input(
                    "unguarded_positive",
                    optional=True,
                    tooltip="The prompt of the unguarded side, when the guarded one went through SAFREE Text Filter.",
                ),
                SafetyFunctionType.Input("safety_function", optional=True, tooltip="Judges both images."),
            ],
            outputs=[
                io.Image.Output(display_name="guarded"),
                io.Image.Output(display_name="unguarded"),
                io.Image.Output(
                    display_name="difference", tooltip="Where the two differ, the largest difference white."
                ),
                io.String.Output(
                    display_name="report", tooltip="All measures, verdicts and the trace as JSON."
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
        sides = {"guarded": guarded, "unguarded": bare}
        judged = (
            {}
            if safety_function is None
            else {side: verdicts(safety_function, images) for side, images in sides.items()}
        )
        change = amplified(guarded, bare)
        if blur_unguarded:
            bare, change = blurred(bare), blurred(change)
        text = json.dumps(report(differences, trace, judged))
        shown = message_ui(told(differences, trace, judged))
        return io.NodeOutput(guarded, bare, change, text, trace, ui=shown)


NODES: list[type[io.ComfyNode]] = [GuardedAndUnguarded]
