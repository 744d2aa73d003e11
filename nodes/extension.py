"""The pack as the host sees it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import demo_model, negation_sets, safe_denoiser, safe_latent_diffusion, safety_trace, safree, semantic_guidance
from .host.folders import register_model_folders


class SafeGuidanceExtension(ComfyExtension):
    """Registers the model folders and the nodes of every family."""

    async def on_load(self) -> None:
        register_model_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        families = (demo_model, negation_sets, safe_denoiser, safe_latent_diffusion, safety_trace, safree, semantic_guidance)
        return [node for family in families for node in family.NODES]
