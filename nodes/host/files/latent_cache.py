"""Disk cache of encoded negation sets, shared by all workflows and ComfyUI processes, of limited size."""

from __future__ import annotations

import hashlib
import logging
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ....formats import latent_file
from ....formats.atomic_file import remove_abandoned
from ....guidance.core.references import References
from ....reports.plain_text import log

LIMIT = 16 * 2**30
"""Largest total size of all encoded sets in bytes; the least recently used are removed first."""

SUFFIX = ".latents"

_hashes: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def directory() -> Path:
    """Return the folder of the files. ComfyUI never serves folders whose names begin with two underscores."""
    return Path(folder_paths.get_user_directory()) / "__safe_guidance" / "latents"


def vae_hash(vae: Any) -> str | None:
    """Return the SHA-256 of a VAE's weights, their dtype and its class; None for a VAE without weights."""
    return weights_hash(vae.first_stage_model, str(getattr(vae, "vae_dtype", None)))


def weights_hash(network: Any, precision: str = "") -> str | None:
    """Return the SHA-256 of a network's class, precision and weights; None for a network without weights."""
    if network not in _hashes:
        digest = hashlib.sha256(f"{type(network).__qualname__} {precision}".encode())
        weights = network.state_dict()
        for name, tensor in weights.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            # hashlib reads the array where it is: no copy of the weights.
            digest.update(memoryview(numbers))
        _hashes[network] = digest.hexdigest() if weights else ""
    return _hashes[network] or None


def cached(key: str, count: int, encode: Callable[[], Iterable[tuple[Tensor, Tensor | None]]]) -> References:
    """Return the references of a key.

    They come from disk if a complete file is there. Otherwise they are encoded and written to disk.

    Args:
        key: everything that the latents depend on, as text.
        count: number of references.
        encode: encodes them, in batches of latents and regions.
    """
    path = directory() / (hashlib.sha256(key.encode()).hexdigest()[:40] + SUFFIX)
    found = _read(path, key)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        latent_file.write(path, key, count, encode())
        prune(directory(), LIMIT, keep=path)
        return latent_file.read(path, key)
    except (OSError, ValueError) as error:
        log(logging.WARNING, f"encoded images cannot be kept on the disk ({error}). They stay in memory.")
        return gathered(encode())


def gathered(batches: Iterable[tuple[Tensor, Tensor | None]]) -> References:
    """Collect all batches as references in memory."""
    chunks = [(latents.to("cpu", torch.float16), region) for latents, region in batches]
    regions = [region.half() for _, region in chunks if region is not None]
    return References(torch.cat([latents for latents, _ in chunks]), torch.cat(regions) if regions else None)


def _read(path: Path, key: str) -> References | None:
    try:
        found = latent_file.read(path, key)
        os.utime(path)
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log(logging.WARNING, f"{error} The images are encoded again.")
        return None


def prune(folder: Path, limit: int, keep: Path) -> None:
    """Remove the least recently used files until the rest fits into `limit` bytes.

    Temporary files of ended processes are removed as well. `keep` is never removed.
    """
    remove_abandoned(folder)
    files = []
    for path in folder.glob("*"):
        try:
            status = path.stat()
        except OSError:
            continue
        if path.suffix == SUFFIX:
            files.append((path == keep, status.st_mtime, status.st_size, path))
    total = 0
    for kept, _, size, path in sorted(files, reverse=True):
        total += size
        if total > limit and not kept:
            _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        # Another process removed it, or has it open on a system that then keeps it.
        log(logging.DEBUG, f"{path} stays ({error}).")
