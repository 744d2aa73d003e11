"""Where the pack's files live: bundled assets, and model folders that merge with what the user configured in the host."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ...guidance.negation_set import NegationSet, load, save

ASSETS = Path(__file__).resolve().parents[2] / "assets"
NEGATION_SETS = "negation_sets"
SAFETY = "safety"
BUNDLED_SUFFIX = " (bundled)"
EXTENSIONS = {".safetensors"}
SAFETY_EXTENSIONS = {".safetensors", ".onnx"}
WHOLE_INPUT = "."
MAX_FOLDERS = 1000
"""Folders under the host's input folder that are offered."""
FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*\\]')
"""Characters that some file system does not take."""


def register_model_folders() -> None:
    """Make the pack's model folders known to the host, keeping those that `extra_model_paths` already added."""
    for folder, extensions in ((NEGATION_SETS, EXTENSIONS), (SAFETY, SAFETY_EXTENSIONS)):
        default = str(Path(folder_paths.models_dir) / folder)
        paths, _ = folder_paths.folder_names_and_paths.get(folder, ([], set()))
        folder_paths.folder_names_and_paths[folder] = (list(dict.fromkeys([*paths, default])), extensions)


def negation_set_names() -> list[str]:
    """Names to choose from: bundled sets first, then files of the model folders."""
    bundled = sorted(path.stem + BUNDLED_SUFFIX for path in (ASSETS / NEGATION_SETS).glob("*.safetensors"))
    return bundled + folder_paths.get_filename_list(NEGATION_SETS)


def negation_set_path(name: str) -> Path:
    """The file behind a name from `negation_set_names`.

    Raises:
        FileNotFoundError: no such set; the message says where it belongs.
    """
    if name.endswith(BUNDLED_SUFFIX):
        path = ASSETS / NEGATION_SETS / f"{Path(name.removesuffix(BUNDLED_SUFFIX)).name}.safetensors"
        if path.is_file():
            return path
    else:
        found = folder_paths.get_full_path(NEGATION_SETS, name)
        if found is not None:
            return Path(found)
    raise FileNotFoundError(f"There is no negation set named '{name}'. Put its file into models/{NEGATION_SETS} or choose another.")


def save_negation_set(negation_set: NegationSet, name: str, overwrite: bool) -> str:
    """Save a set into models/negation_sets, with a number behind a name that another set has. Returns the name to load it by.

    Raises:
        ValueError: the name would leave that folder, or no file can have it.
    """
    parts = [part.strip() for part in name.strip().removesuffix(".safetensors").split("/")]
    if any(not part or part.startswith(".") or part.endswith(".") or FORBIDDEN.search(part) for part in parts):
        raise ValueError(f"A file cannot have the name '{name}'. Use letters, digits and spaces, and / for sub-folders.")
    folder = Path(folder_paths.get_folder_paths(NEGATION_SETS)[0])
    path = folder.joinpath(*parts[:-1], parts[-1] + ".safetensors")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"The name '{name}' leads out of models/{NEGATION_SETS}. Choose another name.")
    number = 1
    while not overwrite and path.exists() and not _holds(path, negation_set):
        number += 1
        path = path.with_name(f"{parts[-1]}_{number:03}.safetensors")
    save(negation_set, path)
    return path.relative_to(folder).as_posix()


def _holds(path: Path, negation_set: NegationSet) -> bool:
    try:
        return load(path).content_hash == negation_set.content_hash
    except (ValueError, OSError):
        return False


def input_folders() -> list[str]:
    """The host's input folder and its sub-folders, as names to choose from."""
    root = Path(folder_paths.get_input_directory())
    found = [WHOLE_INPUT]
    for parent, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [(Path(parent) / name).relative_to(root).as_posix() for name in folders]
        if len(found) > MAX_FOLDERS:
            break
    return found[:MAX_FOLDERS]


def input_folder(name: str) -> Path:
    """The folder behind a name from `input_folders`.

    Raises:
        FileNotFoundError: there is no such folder under the host's input folder.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_dir():
        raise FileNotFoundError(f"There is no folder '{name}' under the host's input folder. Put the pictures there, or choose another.")
    return path
