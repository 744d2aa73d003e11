"""Saving of what users keep: names that every system takes, and errors of the disk in clear words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import folder_paths

from ....formats import guideline_token_file, negation_set
from ....formats.atomic_file import reason, replacing, write_new
from ....formats.negation_set import NegationSet, load
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ....reports.plain_text import is_encodable, short
from .folders import GUIDELINE_TOKENS, NEGATION_SETS

FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')
"""Characters that some file systems do not allow in names."""
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])", re.IGNORECASE)
"""Names of devices on Windows, which no file can have there, whatever its suffix."""
LONGEST_NAME = 200
"""Most bytes of a file's or a folder's name. File systems allow 255, with the suffix and a number."""
MOST_FOLDERS_IN_NAME = 16
MOST_NUMBERS = 9999
"""Largest number that is appended to a name that is taken."""


def check_file_name(name: str) -> None:
    """Check the beginning of an image's name, which the host then completes.

    Raises:
        ValueError: no file of the output folder can have it.
    """
    segments = name.replace("\\", "/").split("/")
    is_long = len(segments) > MOST_FOLDERS_IN_NAME or any(len(s.encode()) > LONGEST_NAME for s in segments)
    if "\0" in name or ".." in segments or name.startswith(("/", "\\")) or is_long:
        raise ValueError(
            f"A file in the output folder cannot have a name that begins with '{short(name)}'. "
            "Use a short name, and / for sub-folders."
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
    with errors_of_saving(name, f"models/{kind}"):
        if overwrite:
            with replacing(path) as file:
                write(file)
        else:
            path = write_new(path.parent, _numbered(path.stem), write, may_replace)
    return path.relative_to(folder).as_posix()


@contextmanager
def errors_of_saving(name: str, folder: str) -> Iterator[None]:
    """Raise an error of the system in the block as a clear ValueError.

    Args:
        name: of the file, as a person has given it.
        folder: the folder as people know it, such as models/negation_sets.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"'{short(name)}' cannot be saved in {folder}: {reason(error)}.") from error


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
