"""Folders of the pack's files: bundled assets, and model folders registered with the host."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ....reports.plain_text import is_encodable, short

ASSETS = Path(__file__).resolve().parents[3] / "assets"
NEGATION_SETS, GUIDELINE_TOKENS, SAFETY = "negation_sets", "guideline_tokens", "safety"
LORAS = "loras"
"""The host's own folder of LoRAs. The demo model's LoRA is listed after the user's."""
NOUNS = {NEGATION_SETS: "negation set", GUIDELINE_TOKENS: "file of guideline tokens"}
"""Kinds of files: their folder under `models` and `assets`, and the word for one file in messages."""
BUNDLED_SUFFIX = " (bundled)"
EXTENSIONS = {".safetensors"}
SAFETY_EXTENSIONS = {".safetensors", ".onnx"}
WHOLE_INPUT = "."
"""Name of the host's input folder itself among its sub-folders."""
MAX_FOLDERS = 1000
"""Most folders under the host's input folder that a node lists."""


def register_model_folders() -> None:
    """Register the pack's model folders with the host.

    They come before those that `extra_model_paths` has already added.
    """
    kinds = {NEGATION_SETS: EXTENSIONS, GUIDELINE_TOKENS: EXTENSIONS, SAFETY: SAFETY_EXTENSIONS}
    for folder, extensions in kinds.items():
        default = str(Path(folder_paths.models_dir) / folder)
        paths, _ = folder_paths.folder_names_and_paths.get(folder, ([], set()))
        folder_paths.folder_names_and_paths[folder] = (list(dict.fromkeys([default, *paths])), extensions)
    folder_paths.add_model_folder_path(LORAS, str(ASSETS / LORAS))


def file_names(kind: str) -> list[str]:
    """Return the names of all files of a kind: bundled ones first, then those in the model folders."""
    bundled = sorted(path.stem + BUNDLED_SUFFIX for path in (ASSETS / kind).glob("*.safetensors"))
    # A name that is not text cannot be part of a prompt.
    return bundled + [name for name in folder_paths.get_filename_list(kind) if is_encodable(name)]


def file_path(kind: str, name: str) -> Path:
    """Return the path of a file by its name from `file_names`.

    Raises:
        FileNotFoundError: there is no such file; the message says where it belongs.
    """
    if name.endswith(BUNDLED_SUFFIX):
        path = ASSETS / kind / f"{Path(name.removesuffix(BUNDLED_SUFFIX)).name}.safetensors"
        if path.is_file():
            return path
    elif is_encodable(name) and "\0" not in name:
        found = folder_paths.get_full_path(kind, name)
        if found is not None:
            return Path(found)
    raise FileNotFoundError(
        f"There is no {NOUNS[kind]} named '{short(name)}'. Put its file into models/{kind} or choose another."
    )


def negation_set_names() -> list[str]:
    """Return the names of all negation sets."""
    return file_names(NEGATION_SETS)


def negation_set_path(name: str) -> Path:
    """Return the path of a negation set by its name from `negation_set_names`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return file_path(NEGATION_SETS, name)


def input_folders() -> list[str]:
    """Return the names of the host's input folder and of its sub-folders, at most MAX_FOLDERS."""
    root = Path(folder_paths.get_input_directory())
    found = [WHOLE_INPUT]
    for parent, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [(Path(parent) / name).relative_to(root).as_posix() for name in folders]
        found += [name for name in names if is_encodable(name)]
        if len(found) > MAX_FOLDERS:
            break
    return found[:MAX_FOLDERS]


def input_folder(name: str) -> Path:
    """Return the path of a folder by its name from `input_folders`.

    Raises:
        FileNotFoundError: there is no such folder under the host's input folder.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    path = Path(os.path.realpath(root / name)) if is_encodable(name) and "\0" not in name else None
    if path is None or not path.is_relative_to(root) or not os.path.isdir(path):
        raise FileNotFoundError(
            f"There is no folder '{short(name)}' under the host's input folder. "
            "Create it and put the images there, or choose another folder."
        )
    return path
