"""Negation sets from the host's input folder, with progress, and interruptible."""

from __future__ import annotations

import hashlib
from pathlib import Path

import comfy.model_management
import comfy.utils
from torch import Tensor

from ...guidance.negation_set import NegationSet
from ...guidance.picture_files import Skipped, files_in, read_pictures

MAX_BYTES = 8 * 2**30
"""Memory that the pictures of one set may take."""


def state_of(folder: Path, sub_folders: bool) -> str:
    """A text that changes when a file of the folder does."""
    digest = hashlib.sha256()
    for path in files_in(folder, sub_folders):
        status = path.lstat()
        digest.update(f"{path.relative_to(folder).as_posix()} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_folder(
    folder: Path, sub_folders: bool, longest_side: int, name: str, source: str, licence: str
) -> tuple[NegationSet, list[Skipped]]:
    """All pictures of a folder as a set, and the files that are not in it.

    Raises:
        ValueError: there is no picture, or more than memory should hold.
    """
    files = files_in(folder, sub_folders)
    progress = comfy.utils.ProgressBar(len(files))
    pictures: list[Tensor] = []
    skipped: list[Skipped] = []
    total = 0
    for found in read_pictures(folder, files, longest_side):
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update(1)
        if isinstance(found, Skipped):
            skipped.append(found)
            continue
        pictures.append(found)
        total += found.numel()
        if total > MAX_BYTES:
            raise ValueError(
                f"The first {len(pictures)} pictures take {total / 2**30:.0f} GB already. Lower longest_side, or choose a smaller folder."
            )
    if not pictures:
        reasons = "; ".join(f"{s.path}: {s.reason}" for s in skipped[:5]) or "it is empty"
        raise ValueError(f"There is no picture in the folder ({reasons}). Put pictures there, or choose another folder.")
    return NegationSet(tuple(pictures), (None,) * len(pictures), name, source, licence), skipped
