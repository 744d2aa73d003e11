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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..guidance.core.references import References
from . import tensor_file

FORMAT = "safe-guidance latents 1"
BLOCK = 2**24
"""Bytes hashed at a time."""


def write(path: Path, key: str, count: int, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Write `count` references from batches of latents (n, C, h, w) and regions (n, 1, h, w) or None.

    The file appears under its name only when it is complete, so concurrent writers of the same file are safe.

    Raises:
        OSError: the disk is full or read-only. No file is left behind.
    """
    with tensor_file.replacing(path) as file:
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
    """Map a file into memory after validating its metadata, shapes and checksum.

    Raises:
        ValueError: the file is damaged, or has another key.
        FileNotFoundError: there is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("key") != key:
                raise ValueError(f"{path.name} holds something else.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged ({error}).") from error
    latents, regions = tensors.pop("latents", None), tensors.pop("regions", None)
    if (
        latents is None
        or latents.ndim != 4
        or tensors
        or any(t.dtype != torch.float16 for t in (latents, regions) if t is not None)
    ):
        raise ValueError(f"{path.name} does not hold latents.")
    if regions is not None and regions.shape != (len(latents), 1, *latents.shape[2:]):
        raise ValueError(f"{path.name} has regions of another size than its latents.")
    if _digest(path) != metadata.get("sha256"):
        raise ValueError(f"{path.name} is damaged: its content does not match its checksum.")
    return References(latents, regions)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
