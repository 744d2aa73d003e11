"""Optional packages, imported when they are first used."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: its name.
        extra: the extra of this pack that installs it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"The package '{module}' is not installed. Install the pack's extra '{extra}' "
            f"(pip install .[{extra}] in its folder, with ComfyUI's Python), then restart ComfyUI."
        ) from error
