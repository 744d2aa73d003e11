"""Sparse Repellency (SPELL): keep images out of balls around those of a negation set or made before, and apart from each other."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..formats.layouts import Layout
from ..formats.negation_set import NegationSet
from ..guidance.spell import SpellSettings
from .host.engine.hooks import attach
from .host.methods.spell import SpellCorrection
from .shared_inputs import (
    WHOLE_START,
    layout_inputs,
    mask_input,
    reference_inputs,
    take_window,
    window_inputs,
    with_defaults,
)

DEFAULTS = SpellSettings()
AS_THEY_ARE, NORMALIZED = "as they are", "normalised per pixel"


def settings_inputs() -> list[io.Input]:
    """The method's settings."""
    return [
        io.Float.Input(
            "radius",
            default=DEFAULTS.radius,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="How far from every reference predictions are kept, as a root mean square difference of latents. 0 is off. Two "
            "unrelated images are about 1 apart; more keeps further away and reaches more images. The published code's 38.7 is 0.303 "
            "with normalised references.",
        ),
        io.Float.Input(
            "overcompensation",
            default=DEFAULTS.overcompensation,
            min=0.0,
            max=10.0,
            step=0.05,
            tooltip="1 pushes exactly to that distance, more goes beyond it; the published code uses 1.6. 0 is off.",
        ),
        io.Boolean.Input(
            "among_batch",
            default=DEFAULTS.among_batch,
            tooltip="Also keep the images of a batch away from each other, for more variety.",
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
            advanced=True,
            tooltip="Noise level at which the method stops. 0 is the paper's: it acts at every step. More leaves details alone.",
        ),
        io.Float.Input(
            "cap",
            default=DEFAULTS.cap,
            min=0.0,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="Largest change in one step, as a share of the prediction's size, since overlapping balls add up. Less is gentler.",
        ),
        io.Combo.Input(
            "references",
            options=[AS_THEY_ARE, NORMALIZED],
            default=AS_THEY_ARE,
            optional=True,
            advanced=True,
            tooltip="as they are: the paper. normalised per pixel: as the published baseline prepares them; use radius 0.303 with it.",
        ),
        *window_inputs(),
        *layout_inputs(),
    ]


class SparseRepellency(io.ComfyNode):
    """MODEL in, MODEL out: works under every sampler and guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSparseRepellency",
            display_name="Sparse Repellency (SPELL)",
            category="safe guidance/safe denoiser",
            description="Keeps images at a distance from those of a negation set, from earlier ones, and from each other. "
            "Images that come near none come out bit-identical. Works on nearness of whole images; masks in the set are not used.",
            search_aliases=[
                "SPELL",
                "shielded diffusion",
                "memorization",
                "memorisation",
                "diversity",
                "variety",
                "negation set",
                "different",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to protect."),
                *settings_inputs(),
                *reference_inputs(optional=True),
                mask_input(),
                io.Latent.Input(
                    "earlier",
                    optional=True,
                    tooltip="Latents of images that you have: another sampler's output, or loaded ones. New images keep away from "
                    "these as from the set's (the paper's references of earlier batches). More of them leave less room.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: Any = None,
        negation_set: NegationSet | None = None,
        mask: torch.Tensor | None = None,
        earlier: dict[str, Any] | None = None,
        **given: Any,
    ) -> io.NodeOutput:
        if negation_set is not None and vae is None:
            raise ValueError(
                "The negation set needs a VAE to be compared with latents. Connect the model's VAE."
            )
        values = with_defaults(settings_inputs(), given)
        layout, normalized = (
            Layout(values.pop("fit"), values.pop("augmentation")),
            values.pop("references") == NORMALIZED,
        )
        settings = SpellSettings(window=take_window(model, values), **values)
        latents = None if earlier is None else earlier["samples"]
        return io.NodeOutput(
            attach(model, SpellCorrection(negation_set, vae, settings, normalized, layout, mask, latents))
        )


NODES: list[type[io.ComfyNode]] = [SparseRepellency]
