"""Safe Denoiser: keep images away from a negation set while they are made."""

from __future__ import annotations

from typing import Any, get_args

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..formats.layouts import Layout
from ..formats.negation_set import NegationSet
from ..guidance.safe_denoiser.settings import Anchor, Mode, SafeDenoiserSettings
from .host.engine.hooks import attach, trace_of
from .host.engine.ksampler import sample
from .host.methods.safe_denoiser import SafeDenoiserCorrection
from .io_types import SafetyTraceType
from .shared_inputs import (
    WHOLE_START,
    changing_seed_input,
    layout_inputs,
    mask_input,
    reference_inputs,
    sampler_inputs,
    take_window,
    window_inputs,
    with_defaults,
)

CATEGORY = "safe guidance/safe denoiser"
ALIASES = ["negative image", "avoid style", "not like this image", "nsfw", "concept erasing", "negation set"]
DEFAULTS = SafeDenoiserSettings()


def settings_inputs() -> list[io.Input]:
    """The method's settings, the same for both nodes."""
    return [
        io.Float.Input(
            "strength",
            default=DEFAULTS.strength,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="How hard the image is pushed away from the set. 0 is off, the paper uses 0.33 for nudity and up to 0.9 for a style; "
            "more pushes harder and can change the rest of the image. With masks in the set: how much of the marked thing is "
            "replaced; 1 is all of it, 1.2 also holds against a prompt that insists.",
        ),
        io.Combo.Input(
            "mode",
            options=list(get_args(Mode)),
            default=DEFAULTS.mode,
            tooltip="calibrated: acts once an image resembles the set about as much as its own images do (recommended). "
            "exact: the paper's formula, acts on near-copies of a reference only. tempered: the paper's formula, made less strict. "
            "official: what the authors' code subtracts, from every image, without the noise that it adds anew.",
        ),
        io.Float.Input(
            "start_sigma",
            default=WHOLE_START,
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            advanced=True,
            tooltip=f"Noise level at which the method begins; {WHOLE_START:g} begins with the first step. Less spares the layout.",
        ),
        io.Float.Input(
            "end_sigma",
            default=DEFAULTS.window.low,
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            tooltip="Noise level at which the method stops. 4.67 is the paper's (timestep 780 of Stable Diffusion 1.x); "
            "less lets it act on smaller things and for longer, up to 0 for every step. With masks: 0.15.",
        ),
        io.Float.Input(
            "threshold",
            default=DEFAULTS.threshold,
            min=0.0,
            max=2.0,
            step=0.01,
            advanced=True,
            tooltip="calibrated: how similar an image must get before anything happens, as a share of how similar the set's images "
            "are among themselves. More spares more images, less catches more. With masks: how surely a place must show the marked "
            "thing, as a share of how surely the set's own are told from the rest; 0.7 for a hundred images.",
        ),
        io.Float.Input(
            "temperature",
            default=DEFAULTS.temperature,
            min=0.005,
            max=1.0,
            step=0.005,
            advanced=True,
            tooltip="calibrated: less lets the few nearest references decide, more averages over the whole set. With masks: the same for "
            "the parts of images that each place is compared with.",
        ),
        io.Float.Input(
            "cap",
            default=DEFAULTS.cap,
            min=0.0,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="Largest change in one step, as a share of the prediction's size. Less is gentler. With masks: 2, or a thing that "
            "fills much of the image is replaced in part only.",
        ),
        io.Int.Input(
            "effective_dimensions",
            default=DEFAULTS.effective_dimensions,
            min=1,
            max=65536,
            advanced=True,
            tooltip="tempered: how many independent numbers a latent is taken to have. More comes closer to exact.",
        ),
        io.Float.Input(
            "kappa",
            default=DEFAULTS.kappa,
            min=0.0,
            max=200.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="official: more lets the nearest references decide, less averages. The published settings are 6.45 for nudity on "
            "SD 1.4 (strength 0.33), 0.37 for styles (0.9) and for single images (0.69), 16.9 on SD3 (0.03).",
        ),
        io.Combo.Input(
            "anchor",
            options=list(get_args(Anchor)),
            default=DEFAULTS.anchor,
            optional=True,
            advanced=True,
            tooltip="Which prediction is compared with the set. prediction: the one after CFG, what the image will be (the authors' "
            "code). unconditional: the one without the prompt (the paper), which CFG then works against; costs a model call when CFG is 1.",
        ),
        *window_inputs(),
        *layout_inputs(),
    ]


def protect(
    model: ModelPatcher, vae: Any, negation_set: NegationSet, mask: torch.Tensor | None, given: dict[str, Any]
) -> ModelPatcher:
    """The model with the method attached, from the values of `settings_inputs`."""
    values = with_defaults(settings_inputs(), given)
    layout = Layout(values.pop("fit"), values.pop("augmentation"))
    window = take_window(model, values)
    return attach(
        model,
        SafeDenoiserCorrection(
            negation_set, vae, SafeDenoiserSettings(window=window, **values), layout, mask
        ),
    )


class SafeDenoiser(io.ComfyNode):
    """MODEL in, MODEL out: works under every sampler and guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeDenoiser",
            display_name="Safe Denoiser",
            category=CATEGORY,
            description="Keeps images away from a negation set while they are sampled. Images that do not resemble the set come out "
            "bit-identical. Put it between the model and any sampler.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The model to protect."),
                *reference_inputs(),
                *settings_inputs(),
                mask_input(),
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


class SafeDenoiserSampler(io.ComfyNode):
    """KSampler with a negation set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeDenoiserSampler",
            display_name="Safe Denoiser Sampler",
            category=CATEGORY,
            description="KSampler and Safe Denoiser in one node: samples an image that stays away from a negation set.",
            search_aliases=[*ALIASES, "ksampler", "safe sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What the text says it should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to start from."),
                *reference_inputs(),
                *sampler_inputs(changing_seed_input("The random seed; the same seed gives the same image.")),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Less than 1 starts from the latent's image. Below about 0.8 the method's usual window has already passed.",
                ),
                *settings_inputs(),
                mask_input(),
            ],
            outputs=[
                io.Latent.Output(),
                SafetyTraceType.Output(
                    display_name="trace", tooltip="What the corrections did at each step, for Safety Trace."
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


NODES: list[type[io.ComfyNode]] = [SafeDenoiser, SafeDenoiserSampler]
