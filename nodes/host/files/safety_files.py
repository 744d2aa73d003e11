"""Names and paths of detectors' files: the bundled ones, and those in models/safety."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .folders import ASSETS, BUNDLED_SUFFIX, SAFETY

DEMO_GUIDE, DEMO_CLIP = "demo guide", "demo clip"
BUNDLED = {
    name + BUNDLED_SUFFIX: ASSETS / "demo_model" / file
    for name, file in ((DEMO_GUIDE, "guide.safetensors"), (DEMO_CLIP, "clip.safetensors"))
}


def safety_names(
    bundled: str | None = None, suffixes: tuple[str, ...] = (".safetensors", ".onnx")
) -> list[str]:
    """Return the names of detectors: a bundled one first, then the files in models/safety.

    Args:
        bundled: DEMO_GUIDE, DEMO_CLIP or None.
        suffixes: of the files to list.
    """
    files = [name for name in folder_paths.get_filename_list(SAFETY) if name.endswith(suffixes)]
    return [*([bundled + BUNDLED_SUFFIX] if bundled else []), *files]


def bundled_note(name: str) -> str:
    """Return what to know about a detector by its name from `safety_names`; empty for a user's own file."""
    if name not in BUNDLED:
        return ""
    return (
        f"'{name}' knows only the demo model's world of drawn shapes: its verdict on any other image means "
        "nothing. For real images choose a file of your own in models/safety."
    )


def safety_path(name: str) -> Path:
    """Return the path of a detector's file by its name from `safety_names`.

    Raises:
        FileNotFoundError: there is no such file; the message says where it belongs.
    """
    found = BUNDLED.get(name) or folder_paths.get_full_path(SAFETY, name)
    if found is None:
        raise FileNotFoundError(
            f"There is no file '{name}' in models/{SAFETY}. Put it there or choose another file."
        )
    return Path(found)
