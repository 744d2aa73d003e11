"""The pack's safetensors files: a writer for files larger than memory, a reader that checks the format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic_file import replacing

ALIGNMENT = 64
"""The tensor data starts at a multiple of this many bytes, so that memory-mapped numbers are aligned."""
DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}
"""Types of tensors in the pack's files, with the names that safetensors gives them."""


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file whose tensors follow in this order without gaps.

    Args:
        tensors: type and shape of each tensor by name.
        metadata: text by name.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def data(tensor: Tensor) -> bytes:
    """Return a tensor's numbers in the byte order of the file."""
    found: bytes = tensor.detach().cpu().contiguous().numpy().tobytes()
    return found


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole file; an existing file stays as it is until the new one is complete."""
    with replacing(path) as file:
        write_into(file, tensors, metadata)


def write_into(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the content of a file into an open one, tensor by tensor."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    file.write(header(layout, metadata))
    for tensor in tensors.values():
        file.write(data(tensor))


@contextmanager
def opened(path: Path, file_format: str, refusal: str) -> Iterator[Any]:
    """Open a file of one of the pack's formats, as `safetensors.safe_open` does.

    Args:
        path: the file.
        file_format: the entry `format` that its metadata must have.
        refusal: what follows the file's name in the error about another format.

    Raises:
        ValueError: the file is damaged, not a safetensors file, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != file_format:
                raise ValueError(f"{path.name} {refusal}")
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is damaged or not a safetensors file ({error}). Copy it again from its source."
        ) from error
