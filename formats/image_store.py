"""Room for more pictures than memory holds: they are collected in memory first, and in a file that is mapped beyond that."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

IN_MEMORY = 2**30
"""Bytes of pictures that are collected before they go to a file."""


class PictureStore:
    """Collects uint8 pictures (H, W, 3) of any sizes.

    Args:
        folder: where the file goes if one is needed. It has no name any more when `pictures` returns, where the system allows
            that, and belongs to a temporary folder otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: list[Tensor] = []
        self._waiting_bytes = 0
        self._shapes: list[torch.Size] = []
        self._file: BinaryIO | None = None
        self._path = ""

    def add(self, picture: Tensor) -> None:
        """Take one more. Raises OSError when the disk is full."""
        self._waiting.append(picture)
        self._waiting_bytes += picture.numel()
        if self._waiting_bytes > IN_MEMORY:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, self._path = tempfile.mkstemp(dir=self._folder, prefix="safe_guidance_", suffix=".pictures")
            self._file = os.fdopen(handle, "wb")
        for picture in self._waiting:
            self._file.write(picture.contiguous().numpy().tobytes())
            self._shapes.append(picture.shape)
        self._waiting, self._waiting_bytes = [], 0

    def pictures(self) -> tuple[Tensor, ...]:
        """All pictures in order. Nothing can be added afterwards."""
        if self._file is None:
            return tuple(self._waiting)
        self._flush()
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
        """Leave nothing behind, when no pictures are asked for."""
        if self._file is not None:
            self._file.close()
            self._remove()

    def _remove(self) -> None:
        try:
            os.unlink(self._path)
        except OSError:
            # A system that keeps open files; the host empties its temporary folder when it starts.
            return
