"""Reader of image folders: readable files become images, all others are listed with a reason."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .negation_set import MIN_SIDE

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Decoders that a file's content may choose; among Pillow's others are some that start programs."""
MAX_FILE_BYTES = 2**28
"""Larger files are not opened, because no image that a set can use needs 256 MB."""
MAX_FILES = 200_000
"""Most files that a folder may have."""


@dataclass(frozen=True)
class Skipped:
    """File that was not read as an image: its path inside the folder, and the reason."""

    path: str
    reason: str


def files_in(folder: Path, sub_folders: bool) -> list[Path]:
    """List the files of a folder in a stable order. Hidden files and linked folders are left out.

    Raises:
        ValueError: there are more than MAX_FILES.
    """
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if sub_folders and not name.startswith("."))
        found += [Path(parent) / name for name in sorted(names) if not name.startswith(".")]
        if len(found) > MAX_FILES:
            raise ValueError(f"{folder.name} has more than {MAX_FILES} files. Choose a smaller folder.")
    return found


def read_images(folder: Path, files: list[Path], longest_side: int) -> Iterator[Tensor | Skipped]:
    """Yield each file's image, or the reason why it was skipped. No file makes this raise an error.

    Args:
        folder: the folder that paths are reported relative to. Links that lead out of it are skipped.
        files: paths inside the folder.
        longest_side: larger images are reduced to this many pixels.

    Yields:
        uint8 (H, W, 3), upright according to EXIF, or a Skipped.
    """
    root = folder.resolve()
    for path in files:
        shown = path.relative_to(folder).as_posix().encode("utf-8", "replace").decode()
        try:
            _check_file(path, root)
            yield _read(path, longest_side)
        except ValueError as error:
            yield Skipped(shown, str(error))
        except UnidentifiedImageError:
            yield Skipped(shown, "no image, whatever its name says")
        except Image.DecompressionBombError:
            yield Skipped(shown, "more pixels than any model paints")
        except MemoryError:
            yield Skipped(shown, "does not fit into memory")
        except Exception as error:
            # Decoders can raise any exception on a damaged file. It must not stop the other files.
            yield Skipped(shown, f"damaged ({type(error).__name__}: {error})".replace(str(path), shown))


def _check_file(path: Path, root: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError("not an image by its name")
    if not path.resolve().is_relative_to(root):
        raise ValueError("a link that leads out of the folder")
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    if status.st_size == 0:
        raise ValueError("empty")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES // 2**20} MB")


def _read(path: Path, longest_side: int) -> Tensor:
    with warnings.catch_warnings():
        # Pillow only warns about images between its limit and twice its limit.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as image:
                image.seek(0)
                image.draft("RGB", (longest_side, longest_side))
                upright = ImageOps.exif_transpose(_eight_bit(image))
        except Image.DecompressionBombWarning as warning:
            raise ValueError("more pixels than any model paints") from warning
    if max(upright.size) > longest_side:
        upright.thumbnail((longest_side, longest_side))
    if min(upright.size) < MIN_SIDE:
        raise ValueError(f"{upright.width} x {upright.height} pixels, a side needs at least {MIN_SIDE}")
    rgb = upright.convert("RGB")
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey images to 8 bits, because Pillow would clip them. Return others unchanged."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    image.load()
    return image
