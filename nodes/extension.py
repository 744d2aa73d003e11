"""The pack as the host sees it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    clip_safety_functions,
    compare_guarded,
    demo_annotated_set,
    demo_model,
    detect_and_guide,
    detector_safety_functions,
    guideline_token_learning,
    guideline_tokens,
    negation_set_files,
    negation_set_inspection,
    negation_set_safety,
    negation_sets,
    safe_data_guidance,
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
from .number_inputs import with_checked_numbers

FAMILIES = (
    demo_model,
    negation_set_files,
    negation_sets,
    negation_set_inspection,
    safe_denoiser,
    spell,
    safe_latent_diffusion,
    semantic_guidance,
    safree,
    detector_safety_functions,
    clip_safety_functions,
    negation_set_safety,
    safety_functions,
    safe_text_guidance,
    safe_data_guidance,
    guideline_tokens,
    guideline_token_learning,
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
        nodes = [node for family in FAMILIES for node in family.NODES]
        return [with_checked_numbers(with_error_messages(node)) for node in nodes]
