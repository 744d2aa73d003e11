"""Safe Guidance: a ComfyUI node pack that keeps diffusion models away from what their user does not want, while they sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes.extension import SafeGuidanceExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> SafeGuidanceExtension:
    """What the host calls to get the pack's nodes. Imports inside, so that the mathematics can be used without the host."""
    from .nodes.extension import SafeGuidanceExtension

    return SafeGuidanceExtension()
