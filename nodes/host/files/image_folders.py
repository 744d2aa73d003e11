"""Negation sets from folders of ComfyUI's input folder, with a progress bar, and interruptible."""

from __future__ import annotations

import hashlib
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths

from ....formats.image_files import Skipped, files_in, read_images
from ....formats.image_store import ImageStore
from ....formats.negation_set import NegationSet


def state_of(folder: Path, sub_folders: bool) -> str:
    """Return a hash that changes when a file of the folder changes."""
    digest = hashlib.sha256()
    for path in files_in(folder, sub_folders):
        status = path.lstat()
        digest.update(
            f"{path.relative_to(folder).as_posix()} {status.st_size} {status.st_mtime_ns}".encode(
                "utf-8", "surrogateescape"
            )
        )
    return digest.hexdigest()


def read_folder(
    folder: Path, sub_folders: bool, longest_side: int, name: str, source: str, licence: str
) -> tuple[NegationSet, list[Skipped]]:
    """Read all images of a folder as a set, and list the files that were skipped.

    Raises:
        ValueError: there is no image, or the images do not fit on the disk.
    """
    files = files_in(folder, sub_folders)
    store = ImageStore(Path(folder_paths.get_temp_directory()))
    try:
        skipped = _collect(folder, files, longest_side, store)
        images = store.images()
    except OSError as error:
        store.discard()
        raise ValueError(
            f"The images do not fit on the disk ({error.strerror or 'unknown reason'}). "
            "Lower longest_side, or choose a smaller folder."
        ) from error
    except BaseException:
        store.discard()
        raise
    if not images:
        reasons = "; ".join(f"{s.path}: {s.reason}" for s in skipped[:5]) or "it is empty"
        raise ValueError(
            f"There is no image in the folder ({reasons}). Put images there, or choose another folder."
        )
    return NegationSet(images, (None,) * len(images), name, source, licence), skipped


def _collect(folder: Path, files: list[Path], longest_side: int, store: ImageStore) -> list[Skipped]:
    progress = comfy.utils.ProgressBar(len(files))
    skipped: list[Skipped] = []
    for found in read_images(folder, files, longest_side):
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update(1)
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            store.add(found)
    return skipped
