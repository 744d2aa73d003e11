"""Safe Guidance: a ComfyUI node pack that steers diffusion models away from unwanted content."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes.extension import SafeGuidanceExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> SafeGuidanceExtension:
    """Return the extension with the pack's nodes; ComfyUI calls this function when it loads the pack.

    The import is inside the function, so that the mathematics can be used without ComfyUI.
    """
    from .nodes.extension import SafeGuidanceExtension

    return SafeGuidanceExtension()
