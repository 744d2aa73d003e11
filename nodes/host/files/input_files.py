"""Single files in the host's input folder, and the pack's bundled examples of the same kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import folder_paths

from ....reports.plain_text import is_encodable, short
from .folders import ASSETS, BUNDLED_SUFFIX

TRACES = "traces"
"""Folder of the bundled example traces under `assets`."""
MAX_FILES = 1000
"""Files under the host's input folder that are offered."""


def bundled_or_input_names(kind: str, suffixes: Sequence[str]) -> list[str]:
    """List the names to choose from.

    Bundled examples of the kind come first, then files with these suffixes in the input folder.
    """
    examples = (path for path in (ASSETS / kind).glob("*") if path.suffix in suffixes)
    return sorted(path.name + BUNDLED_SUFFIX for path in examples) + input_file_names(suffixes)


def bundled_or_input_path(kind: str, name: str, suffixes: Sequence[str]) -> Path:
    """Return the file behind a name from `bundled_or_input_names`.

    Raises:
        FileNotFoundError: there is no such file under the host's input folder, or it has another suffix.
    """
    if name.endswith(BUNDLED_SUFFIX):
        path = ASSETS / kind / Path(name.removesuffix(BUNDLED_SUFFIX)).name
        if path.suffix in suffixes and path.is_file():
            return path
    return input_file(name, suffixes)


def input_file_names(suffixes: Sequence[str]) -> list[str]:
    """List at most MAX_FILES files with these suffixes in ComfyUI's input folder and its sub-folders."""
    root = Path(folder_paths.get_input_directory())
    found: list[str] = []
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        chosen = sorted(name for name in names if name.lower().endswith(tuple(suffixes)) and name[0] != ".")
        paths = [(Path(parent) / name).relative_to(root).as_posix() for name in chosen]
        # A name that is not text cannot be part of a prompt.
        found += [path for path in paths if is_encodable(path)]
        if len(found) > MAX_FILES:
            break
    return found[:MAX_FILES]


def input_file(name: str, suffixes: Sequence[str]) -> Path:
    """Return the file behind a name from `input_file_names`.

    Raises:
        FileNotFoundError: there is no such file under the host's input folder, or it has another suffix.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    path = Path(os.path.realpath(root / name)) if is_encodable(name) and "\0" not in name else root
    if not path.is_relative_to(root) or not os.path.isfile(path) or path.suffix.lower() not in suffixes:
        raise FileNotFoundError(
            f"There is no file '{short(name)}' of the kind {' or '.join(suffixes)} under the host's input "
            "folder. Put it there, or choose another."
        )
    return path
