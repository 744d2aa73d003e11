"""Folders of the pack's files: bundled assets, and model folders registered with the host."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import folder_paths

from ....formats import guideline_token_file, negation_set
from ....formats.atomic_file import reason, replacing, write_new
from ....formats.negation_set import NegationSet, load
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
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
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')
"""Characters that some file systems do not allow in names."""
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])", re.IGNORECASE)
"""Names of devices on Windows, which no file can have there, whatever its suffix."""
LONGEST_NAME = 200
"""Most bytes of a file's or a folder's name. File systems allow 255, with the suffix and a number."""
MOST_FOLDERS_IN_NAME = 16
MOST_NUMBERS = 9999
"""Largest number that is appended to a name that is taken."""


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


def path_to_save(kind: str, name: str) -> tuple[Path, Path]:
    """Return the path at which a file of a kind is saved, and the folder of the kind.

    Args:
        kind: of the file.
        name: that a person has given; a / makes a sub-folder.

    Raises:
        ValueError: the name leads out of that folder, or no file can have it.
    """
    segments = [segment.strip() for segment in name.strip().removesuffix(".safetensors").split("/")]
    if not is_encodable(name) or not all(map(_is_file_name, segments)):
        raise ValueError(
            f"A file cannot have the name '{short(name)}'. "
            "Use letters, digits and spaces, and / for sub-folders."
        )
    is_long = any(len(segment.encode()) > LONGEST_NAME for segment in segments)
    if is_long or len(segments) > MOST_FOLDERS_IN_NAME:
        raise ValueError(
            f"The name '{short(name)}' is too long for a file. "
            f"Use at most {LONGEST_NAME} letters and {MOST_FOLDERS_IN_NAME} folders."
        )
    folder = Path(folder_paths.get_folder_paths(kind)[0])
    path = folder.joinpath(*segments[:-1], segments[-1] + ".safetensors")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"The name '{short(name)}' leads out of models/{kind}. Choose another name.")
    return path, folder


def _is_file_name(name: str) -> bool:
    """Return True if a file or a folder can have a name on every system."""
    return (
        bool(name)
        and not name.startswith(".")
        and not name.endswith(".")
        and not FORBIDDEN.search(name)
        and not RESERVED.fullmatch(name.split(".")[0].rstrip())
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


def save_negation_set(saved: NegationSet, name: str, overwrite: bool) -> str:
    """Save a negation set into models/negation_sets and return the name to load it by.

    A number is appended to a name that another set has, unless `overwrite` is set.

    Raises:
        ValueError: the name leads out of that folder, no file can have it, or the disk does not take it.
    """

    def write(file: BinaryIO) -> None:
        negation_set.write_into(file, saved)

    return _save(NEGATION_SETS, name, write, lambda path: _holds(path, saved), overwrite)


def _save(
    kind: str,
    name: str,
    write: Callable[[BinaryIO], None],
    may_replace: Callable[[Path], bool],
    overwrite: bool,
) -> str:
    """Write a file of a kind under a name, or the name with the first free number; return its name."""
    path, folder = path_to_save(kind, name)
    try:
        if overwrite:
            with replacing(path) as file:
                write(file)
        else:
            path = write_new(path.parent, _numbered(path.stem), write, may_replace)
    except OSError as error:
        raise ValueError(f"'{short(name)}' cannot be saved in models/{kind}: {reason(error)}.") from error
    return path.relative_to(folder).as_posix()


def _numbered(stem: str) -> Iterator[str]:
    """Yield a file's name, and then the same with numbers."""
    yield f"{stem}.safetensors"
    for number in range(2, MOST_NUMBERS + 1):
        yield f"{stem}_{number:03}.safetensors"


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
        ValueError: the name leads out of that folder, no file can have it, or the disk does not take it.
    """

    def write(file: BinaryIO) -> None:
        guideline_token_file.write_into(file, tokens)

    return _save(GUIDELINE_TOKENS, name, write, lambda path: False, overwrite)


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
