"""Storage for more images than memory holds: kept in memory up to a limit, then in a memory-mapped file."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

IN_MEMORY = 2**30
"""Bytes of images that are collected before they go to a file."""


class ImageStore:
    """Collects uint8 images (H, W, 3) of any sizes.

    Args:
        folder: a temporary folder for the file, which is only written above IN_MEMORY bytes. `images` unlinks
            the file, or leaves it there if the system does not unlink open files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: list[Tensor] = []
        self._waiting_bytes = 0
        self._shapes: list[torch.Size] = []
        self._file: BinaryIO | None = None
        self._path = ""

    def add(self, image: Tensor) -> None:
        """Add an image (H, W, 3) uint8. Raises OSError when the disk is full."""
        self._waiting.append(image)
        self._waiting_bytes += image.numel()
        if self._waiting_bytes > IN_MEMORY:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, self._path = tempfile.mkstemp(dir=self._folder, prefix="safe_guidance_", suffix=".images")
            self._file = os.fdopen(handle, "wb")
        for image in self._waiting:
            self._file.write(image.contiguous().numpy().tobytes())
            self._shapes.append(image.shape)
        self._waiting, self._waiting_bytes = [], 0

    def images(self) -> tuple[Tensor, ...]:
        """Return all images in order. Nothing can be added afterwards.

        Raises:
            OSError: the disk is full. `discard` removes the file.
        """
        if self._file is None:
            return tuple(self._waiting)
        self._flush()
        # Closing writes what is still buffered.
        self._file.close()
        total = sum(shape.numel() for shape in self._shapes)
        mapped = torch.from_file(self._path, shared=False, size=total, dtype=torch.uint8)
        self._remove()
        found, start = [], 0
        for shape in self._shapes:
            found.append(mapped[start : start + shape.numel()].view(shape))
            start += shape.numel()
        return tuple(found)

    def discard(self) -> None:
        """Remove the file when the images are not needed after all."""
        if self._file is not None:
            with suppress(OSError):
                # On a full disk, what is still buffered cannot be written.
                self._file.close()
            self._remove()

    def _remove(self) -> None:
        try:
            os.unlink(self._path)
        except OSError:
            # This system does not unlink open files. The host empties its temporary folder when it starts.
            return
