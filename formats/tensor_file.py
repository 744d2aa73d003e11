"""Writing safetensors files a tensor at a time, so that a file may be larger than memory, and never half."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

ALIGNMENT = 64
"""Data begins at a multiple of this, so that mapped numbers are aligned."""
TEMPORARY_SUFFIX = ".tmp"
DTYPES = {torch.float16: "F16", torch.uint8: "U8"}
"""Types that the pack keeps, by the format's names for them."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, and leaves no trace otherwise.

    Whoever else writes the same file at the same time does no harm, and whoever has the old one open keeps it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file whose tensors follow in this order without gaps."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def data(tensor: Tensor) -> bytes:
    """A tensor's numbers as a file holds them."""
    found: bytes = tensor.detach().cpu().contiguous().numpy().tobytes()
    return found


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole file."""
    with replacing(path) as file:
        file.write(
            header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)
        )
        for tensor in tensors.values():
            file.write(data(tensor))
