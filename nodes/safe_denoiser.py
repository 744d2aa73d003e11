"""Safe Denoiser: keep images away from a negation set during sampling."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..formats.negation_set import NegationSet
from .host.engine.hooks import trace_of
from .host.engine.ksampler import sample
from .io_types import SafetyTraceType
from .model_inputs import model_input, prompt_inputs
from .safe_denoiser_inputs import protect, settings_inputs, use_input
from .shared_inputs import (
    changing_seed_input,
    mask_input,
    reference_inputs,
    sampler_inputs,
)

CATEGORY = "safe guidance/safe denoiser"
ALIASES = ["negative image", "avoid style", "not like this image", "nsfw", "concept erasing", "negation set"]


class SafeDenoiserNode(io.ComfyNode):
    """Attaches Safe Denoiser to a MODEL; works with every sampler and guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeDenoiser",
            display_name="Safe Denoiser",
            category=CATEGORY,
            description="Keeps images away from the reference images of a negation set during "
            "sampling. Images that do not resemble the set stay bit-identical. Place it "
            "between the model and any sampler.",
            search_aliases=ALIASES,
            inputs=[
                model_input(),
                *reference_inputs(),
                *settings_inputs(),
                mask_input(),
                use_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: Any,
        negation_set: NegationSet,
        mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        return io.NodeOutput(protect(model, vae, negation_set, mask, settings))


class SafeDenoiserSamplerNode(io.ComfyNode):
    """Samples as KSampler does, with Safe Denoiser on the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeDenoiserSampler",
            display_name="Safe Denoiser Sampler",
            category=CATEGORY,
            description="KSampler and Safe Denoiser in one node: samples an image that keeps away "
            "from the reference images of a negation set.",
            search_aliases=[*ALIASES, "ksampler", "safe sampler"],
            inputs=[
                io.Model.Input("model", tooltip="Model to sample from and to protect."),
                *prompt_inputs(),
                *reference_inputs(),
                *sampler_inputs(
                    changing_seed_input("Random seed of the noise. The same seed gives the same image.")
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Amount of denoising: 1 starts from pure noise, a lower value keeps more of "
                    "the input image. Below about 0.8 the method's usual window has already "
                    "passed.",
                ),
                *settings_inputs(),
                mask_input(),
                use_input(),
            ],
            outputs=[
                io.Latent.Output(),
                SafetyTraceType.Output(
                    display_name="trace",
                    tooltip="What the corrections did at each step. Connect it to Safety Trace.",
                ),
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
        negation_set: NegationSet,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        protected = protect(model, vae, negation_set, mask, settings)
        latent = sample(
            protected, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
        )
        return io.NodeOutput(latent, trace_of(protected, latent["samples"]))


NODES: list[type[io.ComfyNode]] = [SafeDenoiserNode, SafeDenoiserSamplerNode]
