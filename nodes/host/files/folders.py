"""Folders of the pack's files: bundled assets, and model folders registered with the host."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ....formats import guideline_token_file
from ....formats.negation_set import NegationSet, load, save
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens

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
FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*\\]')
"""Characters that some file systems do not allow in names."""


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
    return bundled + folder_paths.get_filename_list(kind)


def file_path(kind: str, name: str) -> Path:
    """Return the path of a file by its name from `file_names`.

    Raises:
        FileNotFoundError: there is no such file; the message says where it belongs.
    """
    if name.endswith(BUNDLED_SUFFIX):
        path = ASSETS / kind / f"{Path(name.removesuffix(BUNDLED_SUFFIX)).name}.safetensors"
        if path.is_file():
            return path
    else:
        found = folder_paths.get_full_path(kind, name)
        if found is not None:
            return Path(found)
    raise FileNotFoundError(
        f"There is no {NOUNS[kind]} named '{name}'. Put its file into models/{kind} or choose another."
    )


def path_to_save(kind: str, name: str) -> tuple[Path, Path]:
    """Return the path at which a file of a kind is saved, and the folder of the kind.

    Args:
        kind: of the file.
        name: that a person has given; a / makes a sub-folder.

    Raises:
        ValueError: the name leads out of that folder, or no file can have it.
    """
    segments = [segment.strip() for segment in name.strip().removesuffix(".safetensors").split("/")]
    if any(
        not segment or segment.startswith(".") or segment.endswith(".") or FORBIDDEN.search(segment)
        for segment in segments
    ):
        raise ValueError(
            f"A file cannot have the name '{name}'. Use letters, digits and spaces, and / for sub-folders."
        )
    folder = Path(folder_paths.get_folder_paths(kind)[0])
    path = folder.joinpath(*segments[:-1], segments[-1] + ".safetensors")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"The name '{name}' leads out of models/{kind}. Choose another name.")
    return path, folder


def negation_set_names() -> list[str]:
    """Return the names of all negation sets."""
    return file_names(NEGATION_SETS)


def negation_set_path(name: str) -> Path:
    """Return the path of a negation set by its name from `negation_set_names`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return file_path(NEGATION_SETS, name)


def save_negation_set(negation_set: NegationSet, name: str, overwrite: bool) -> str:
    """Save a negation set into models/negation_sets and return the name to load it by.

    A number is appended to a name that another set has, unless `overwrite` is set.

    Raises:
        ValueError: the name leads out of that folder, or no file can have it.
    """
    path, folder = path_to_save(NEGATION_SETS, name)
    stem, number = path.stem, 1
    while not overwrite and path.exists() and not _holds(path, negation_set):
        number += 1
        path = path.with_name(f"{stem}_{number:03}.safetensors")
    save(negation_set, path)
    return path.relative_to(folder).as_posix()


def _holds(path: Path, negation_set: NegationSet) -> bool:
    """Return True if a file holds the same images and masks; False also for a file that cannot be read."""
    try:
        return load(path).content_hash == negation_set.content_hash
    except (ValueError, OSError):
        return False


def save_guideline_tokens(tokens: GuidelineTokens, name: str, overwrite: bool) -> str:
    """Save tokens into models/guideline_tokens and return the name to load them by.

    A number is appended to a name that is taken, unless `overwrite` is set.

    Raises:
        ValueError: the name leads out of that folder, or no file can have it.
    """
    path, folder = path_to_save(GUIDELINE_TOKENS, name)
    stem, number = path.stem, 1
    while not overwrite and path.exists():
        number += 1
        path = path.with_name(f"{stem}_{number:03}.safetensors")
    guideline_token_file.save(tokens, path)
    return path.relative_to(folder).as_posix()


def input_folders() -> list[str]:
    """Return the names of the host's input folder and of its sub-folders, at most MAX_FOLDERS."""
    root = Path(folder_paths.get_input_directory())
    found = [WHOLE_INPUT]
    for parent, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [(Path(parent) / name).relative_to(root).as_posix() for name in folders]
        if len(found) > MAX_FOLDERS:
            break
    return found[:MAX_FOLDERS]


def input_folder(name: str) -> Path:
    """Return the path of a folder by its name from `input_folders`.

    Raises:
        FileNotFoundError: there is no such folder under the host's input folder.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_dir():
        raise FileNotFoundError(
            f"There is no folder '{name}' under the host's input folder. "
            "Create it and put the images there, or choose another folder."
        )
    return path
