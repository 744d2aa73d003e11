"""Writer of safetensors files, one tensor at a time, so that a file may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
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
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(path) as file:
        file.write(header(layout, metadata))
        for tensor in tensors.values():
            file.write(data(tensor))
