"""Sparse Repellency (SPELL): keep images at a distance from references, earlier images and each other."""

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
from .model_inputs import model_input
from .shared_inputs import (
    WHOLE_START,
    layout_inputs,
    mask_input,
    reference_inputs,
    start_sigma_input,
    take_window,
    window_inputs,
    with_defaults,
)

DEFAULTS = SpellSettings()
AS_THEY_ARE, NORMALIZED = "as they are", "normalised per pixel"


def settings_inputs() -> list[io.Input]:
    """Return the inputs for the method's settings."""
    return [
        io.Float.Input(
            "radius",
            default=DEFAULTS.radius,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="Minimum distance to every reference, as a root mean square difference of "
            "latents; 0 is off. A higher value keeps further away and changes more "
            "images. Start with 0.6; unrelated images are about 1 apart. The published "
            "code's 38.7 equals 0.303 with normalised references.",
        ),
        io.Float.Input(
            "overcompensation",
            default=DEFAULTS.overcompensation,
            min=0.0,
            max=10.0,
            step=0.05,
            tooltip="How far a prediction inside the radius is pushed: 1 stops at the radius, 0 "
            "is off. A higher value goes beyond it. Start with 1.6, as in the published "
            "code.",
        ),
        io.Boolean.Input(
            "among_batch",
            default=DEFAULTS.among_batch,
            tooltip="Also keep the images of a batch away from each other. Switch it on for "
            "more variety. Start with off.",
        ),
        start_sigma_input(),
        io.Float.Input(
            "end_sigma",
            default=DEFAULTS.window.low,
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            advanced=True,
            tooltip="Noise level (sigma) at which the method stops. A higher value leaves "
            "details unchanged. Start with 0, the paper's, which acts at every step.",
        ),
        io.Float.Input(
            "cap",
            default=DEFAULTS.cap,
            min=0.0,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="Largest change in one step, relative to the size of the prediction. A "
            "lower value is gentler; the cap matters where several references are "
            "close. Start with 0.5.",
        ),
        io.Combo.Input(
            "references",
            options=[AS_THEY_ARE, NORMALIZED],
            default=AS_THEY_ARE,
            optional=True,
            advanced=True,
            tooltip="How reference latents are prepared. as they are (start here) follows the paper. "
            "normalised per pixel follows the published baseline code; use a radius of 0.303 with it.",
        ),
        *window_inputs(),
        *layout_inputs(),
    ]


class SparseRepellencyNode(io.ComfyNode):
    """Attaches Sparse Repellency to a MODEL; works with every sampler and guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSparseRepellency",
            display_name="Sparse Repellency (SPELL)",
            category="safe guidance/safe denoiser",
            description="Keeps images at a minimum distance from the reference images of a negation "
            "set, from earlier images and from each other. Images that come close to "
            "none stay bit-identical. Compares whole images; masks in the set are not "
            "used.",
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
                model_input(),
                *settings_inputs(),
                *reference_inputs(optional=True),
                mask_input(),
                io.Latent.Input(
                    "earlier",
                    optional=True,
                    tooltip="Latents of images you already have, from another sampler or loaded. New "
                    "images keep away from them as from the negation set (the paper's earlier "
                    "batches). More latents leave less room.",
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
        layout = Layout(values.pop("fit"), values.pop("augmentation"))
        normalized = values.pop("references") == NORMALIZED
        settings = SpellSettings(window=take_window(model, values), **values)
        latents = None if earlier is None else earlier["samples"]
        return io.NodeOutput(
            attach(model, SpellCorrection(negation_set, vae, settings, normalized, layout, mask, latents))
        )


NODES: list[type[io.ComfyNode]] = [SparseRepellencyNode]
