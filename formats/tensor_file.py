"""The pack's safetensors files: a writer for files larger than memory, and the one checked reading.

A reader checks the format, the names, types and shapes of all tensors and the configuration before it reads
a tensor. Tensors are read into memory: if somebody truncates a memory-mapped file, the process dies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import finite_json

ALIGNMENT = 64
"""The tensor data starts at a multiple of this many bytes, so that memory-mapped numbers are aligned."""
DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}
"""Types of tensors in the pack's files, with the names that safetensors gives them."""
READABLE = {
    **{name: dtype for dtype, name in DTYPES.items()},
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types that can be read, by their names in safetensors."""
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""Types of weights."""
BLOCK = 2**24
"""Bytes hashed at a time."""
MOST_PROBLEM = 300
"""Longest description of a problem, in characters: names in a file can be of any length."""
MOST_TEXT = 2**20
"""Longest JSON text in a file's metadata, in characters."""


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


def write_into(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the content of a file into an open one, tensor by tensor."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    file.write(header(layout, metadata))
    for tensor in tensors.values():
        file.write(data(tensor))


def content_hash(path: Path, start: int = 0) -> str:
    """Return the SHA-256 of a file's bytes from `start` on, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class TensorFile:
    """A file whose header is valid. No tensor has been read.

    Attributes:
        path: the file.
        metadata: text by name.
        dtypes: type of each tensor by name.
        shapes: shape of each tensor by name.
        starts: position in the file of each tensor's first byte by name.
    """

    path: Path
    metadata: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]
    starts: Mapping[str, int]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory.

        Raises:
            ValueError: the file has become shorter.
        """
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        if tensor.numel() == 0:
            return tensor
        content = memoryview(tensor.flatten().view(torch.uint8).numpy())
        with self.path.open("rb") as file:
            file.seek(self.starts[name])
            if file.readinto(content) != content.nbytes:
                raise self.error("it is shorter than its header says")
        return tensor

    def weights(self, name: str) -> Tensor:
        """Read one tensor as float32.

        Raises:
            ValueError: its numbers are not all finite, or it cannot be read.
        """
        tensor = self.tensor(name).float()
        if not bool(torch.isfinite(tensor).all()):
            raise self.error(f"its tensor '{name}' has numbers that are not finite")
        return tensor

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: frozenset[torch.dtype] = FLOATS,
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        """Check that the file has exactly these tensors, with types from `dtypes` except those in `ignored`.

        Raises:
            ValueError: a tensor is missing or unknown, or has another shape or type.
        """
        missing, unknown = set(shapes) - set(self.shapes), set(self.shapes) - set(shapes)
        if missing or unknown:
            problem, name = ("has no", min(missing)) if missing else ("has an unknown", min(unknown))
            raise self.error(f"it {problem} tensor '{name}'")
        for name, shape in shapes.items():
            if self.shapes[name] != tuple(shape):
                found = self.shapes[name]
                raise self.error(f"its tensor '{name}' has the shape {found} instead of {tuple(shape)}")
            if name not in ignored and self.dtypes[name] not in dtypes:
                raise self.error(f"its tensor '{name}' has numbers of type {self.dtypes[name]}")

    def description(self, key: str, keys: frozenset[str]) -> dict[str, Any]:
        """Parse the JSON object in an entry of the metadata.

        Args:
            key: the entry.
            keys: names that the object must have; it may have no others.

        Raises:
            ValueError: there is no such object.
        """
        found = parsed(self.metadata.get(key, ""))
        if not isinstance(found, dict):
            raise self.error(f"its entry '{key}' is not a JSON object")
        if found.keys() != keys:
            raise self.error(f"its entry '{key}' must have exactly the keys {', '.join(sorted(keys))}")
        return found

    def error(self, problem: str) -> ValueError:
        """Return the error for a file that violates its format."""
        advice = "Copy it again from its source or choose another file."
        printable = "".join(c if c.isprintable() else "\ufffd" for c in problem)
        return ValueError(f"{self.path.name} cannot be used: {printable[:MOST_PROBLEM]}. {advice}")


def parsed(text: str) -> Any:
    """Parse JSON; None for text that is not JSON, longer than MOST_TEXT or nested too deeply."""
    if len(text) > MOST_TEXT:
        return None
    try:
        return finite_json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_whole(value: Any, least: int, most: int) -> bool:
    """Return True for an integer in [least, most]; booleans are no integers."""
    return type(value) is int and least <= value <= most


def structure(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file of any format.

    Raises:
        ValueError: the file is damaged, unreadable or not a safetensors file.
        FileNotFoundError: there is no such file.
    """
    try:
        with path.open("rb") as raw:
            start = 8 + int.from_bytes(raw.read(8), "little")
        # This checks the types, the sizes and the offsets, which leave no gaps, and the file's length.
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.offset_keys())
            slices = {name: file.get_slice(name) for name in names}
            types = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is damaged or not a safetensors file ({error}). Copy it again from its source."
        ) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{path.name} cannot be read ({error.strerror}). Correct its permissions or choose another file."
        ) from error
    unreadable = next((name for name in names if types[name] not in READABLE), None)
    if unreadable is not None:
        raise ValueError(
            f"{path.name} cannot be used: its tensor '{unreadable}' has numbers of type {types[unreadable]}. "
            "Choose a file with ordinary floating-point numbers."
        )
    dtypes = {name: READABLE[types[name]] for name in names}
    starts = {}
    for name in names:
        starts[name] = start
        start += torch.Size(shapes[name]).numel() * dtypes[name].itemsize
    return TensorFile(path, metadata, dtypes, shapes, starts)


def opened(path: Path, file_format: str, refusal: str) -> TensorFile:
    """Read and check the header of a file of one of the pack's formats.

    Args:
        path: the file.
        file_format: the entry `format` that its metadata must have.
        refusal: what follows the file's name in the error about another format.

    Raises:
        ValueError: the file is damaged, unreadable, not a safetensors file, or of another format.
        FileNotFoundError: there is no such file.
    """
    found = structure(path)
    if found.metadata.get("format") != file_format:
        raise ValueError(f"{path.name} {refusal}")
    return found
