"""The pack as the host sees it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    compare_guarded,
    demo_annotated_set,
    demo_model,
    detect_and_guide,
    guideline_tokens,
    negation_set_inspection,
    negation_sets,
    safe_denoiser,
    safe_latent_diffusion,
    safe_text_guidance,
    safety_functions,
    safety_trace,
    safree,
    sample_and_record,
    semantic_guidance,
    spell,
)
from .host.engine.node_messages import with_error_messages
from .host.files.folders import register_model_folders

FAMILIES = (
    demo_model,
    negation_sets,
    negation_set_inspection,
    safe_denoiser,
    spell,
    safe_latent_diffusion,
    semantic_guidance,
    safree,
    safety_functions,
    safe_text_guidance,
    guideline_tokens,
    detect_and_guide,
    demo_annotated_set,
    sample_and_record,
    safety_trace,
    compare_guarded,
)


class SafeGuidanceExtension(ComfyExtension):
    """Registers the model folders and the nodes of every family."""

    async def on_load(self) -> None:
        register_model_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [with_error_messages(node) for family in FAMILIES for node in family.NODES]
