"""Files of encoded references: written batch by batch, memory-mapped when read, refused when damaged.

A file is in the safetensors format. It has `latents` (N, C, h, w) float16 and optionally `regions`
(N, 1, h, w) float16. Its metadata has the key, which identifies the images and their encoding, and the
SHA-256 of everything after the header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from ..guidance.core.references import References
from . import tensor_file
from .atomic_file import replacing

FORMAT = "safe-guidance latents 1"
CHUNK = 64
"""References whose numbers are checked at a time."""


def write(path: Path, key: str, count: int, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Write `count` references from batches of latents (n, C, h, w) and regions (n, 1, h, w) or None.

    The file appears under its name only when it is complete, so concurrent writers of the same file are safe.

    Raises:
        OSError: the disk is full or read-only. No file is left behind.
    """
    with replacing(path) as file:
        _write(file, key, count, batches)


def _write(file: BinaryIO, key: str, count: int, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    digest = hashlib.sha256()
    shape: tuple[int, ...] = ()
    regions: list[Tensor] = []

    def put(tensor: Tensor) -> None:
        data = tensor_file.data(tensor.half())
        digest.update(data)
        file.write(data)

    for latents, region in batches:
        if not shape:
            shape = (count, *latents.shape[1:])
            file.write(_header(key, shape, region is not None, digest.hexdigest()))
        put(latents)
        if region is not None:
            regions.append(region.half())
    for region in regions:
        put(region)
    # The placeholder had the length of the digest, so the header keeps its size.
    file.seek(0)
    file.write(_header(key, shape, bool(regions), digest.hexdigest()))


def _header(key: str, shape: tuple[int, ...], has_regions: bool, digest: str) -> bytes:
    tensors = {"latents": (torch.float16, shape)}
    if has_regions:
        tensors["regions"] = (torch.float16, (shape[0], 1, *shape[2:]))
    return tensor_file.header(tensors, {"format": FORMAT, "key": key, "sha256": digest})


def read(path: Path, key: str) -> References:
    """Map a file into memory after validating its metadata, shapes, checksum and numbers.

    It is mapped, because encoded sets can be larger than memory. Only this pack writes such files, and it
    replaces them as a whole.

    Raises:
        ValueError: the file is damaged, or has another key.
        FileNotFoundError: there is no such file.
    """
    file = tensor_file.structure(path)
    if file.metadata.get("format") != FORMAT or file.metadata.get("key") != key:
        raise ValueError(f"{path.name} holds something else. Delete it; it is written again when needed.")
    shape = file.shapes.get("latents", ())
    if len(shape) != 4:
        raise file.error("it does not hold latents")
    expected: dict[str, tuple[int, ...]] = {"latents": shape}
    if "regions" in file.shapes:
        expected["regions"] = (shape[0], 1, *shape[2:])
    file.check(expected, frozenset({torch.float16}))
    if tensor_file.content_hash(path, min(file.starts.values())) != file.metadata.get("sha256"):
        raise file.error("it is damaged, because its content does not match its checksum")
    with safe_open(path, framework="pt") as mapped:
        tensors = {name: mapped.get_tensor(name) for name in expected}
    for name, tensor in tensors.items():
        if not all(bool(torch.isfinite(part).all()) for part in tensor.split(CHUNK)):
            raise file.error(f"its {name} have numbers that are not finite")
    return References(tensors["latents"], tensors.get("regions"))
