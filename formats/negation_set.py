"""Negation sets: images of content that a model should avoid, and their file format.

A set stores the images themselves, so that one file serves every VAE and every size. The file is in the
safetensors format: a tensor `picture.000000` (H, W, 3) uint8 for every image, optionally `mask.000000` (H, W)
uint8, and text in the metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tensor_file
from .atomic_file import replacing
from .pixel_values import to_bytes

FORMAT = "safe-guidance negation set 1"
LONGEST_TEXT = 100_000
"""Most characters of the name, the source and the licence each; a longer header could not be read again."""
MAX_SIDE = 2048
"""Longest side of a stored image. Larger images are reduced when a set is built."""

MIN_SIDE = 8
"""Shortest side of a stored image, which is one latent pixel of most VAEs."""


@dataclass(frozen=True)
class NegationSet:
    """Images of content to avoid.

    Attributes:
        images: uint8 (H, W, 3) each, sizes may differ.
        masks: uint8 (H, W) each, 255 where the image is unwanted, or None for the whole image; one per image.
        name, source, licence: free text for people. What no file can hold, halves of surrogate pairs, is
            replaced.
    """

    images: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    name: str = ""
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        for text in ("name", "source", "licence"):
            object.__setattr__(self, text, getattr(self, text).encode("utf-8", "replace").decode())
            if len(getattr(self, text)) > LONGEST_TEXT:
                raise ValueError(
                    f"The {text} of the negation set has more than {LONGEST_TEXT} characters. Shorten it."
                )
        if not self.images:
            raise ValueError("The negation set has no images. Give it at least one.")
        if len(self.masks) != len(self.images):
            raise ValueError(
                f"The negation set has {len(self.images)} images but {len(self.masks)} masks. "
                "Give one mask per image."
            )
        for index, (image, mask) in enumerate(zip(self.images, self.masks)):
            _check_image(image, index)
            if mask is not None and (mask.dtype != torch.uint8 or mask.shape != image.shape[:2]):
                raise ValueError(
                    f"Mask {index} does not have the size of its image. "
                    f"Use masks of {tuple(image.shape[:2])}."
                )

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def content_hash(self) -> str:
        """Return the SHA-256 of the images and masks. Name, source and licence are not included."""
        digest = hashlib.sha256()
        for image, mask in zip(self.images, self.masks):
            digest.update(str(tuple(image.shape)).encode() + (b"masked" if mask is not None else b"whole"))
            digest.update(image.contiguous().numpy().tobytes())
            if mask is not None:
                digest.update(mask.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def sizes(self) -> list[tuple[int, int]]:
        """Return the distinct (width, height) of the images, in order of appearance."""
        return list(dict.fromkeys((p.shape[1], p.shape[0]) for p in self.images))


def _check_image(image: Tensor, index: int) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"Image {index} is not an 8-bit RGB image. Convert it before adding it to a negation set."
        )
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise ValueError(
            f"Image {index} is {width} x {height} pixels. "
            f"Use images with sides from {MIN_SIDE} to {MAX_SIDE} pixels."
        )


def from_images(
    images: Tensor, masks: Tensor | None = None, name: str = "", source: str = "", licence: str = ""
) -> NegationSet:
    """Build a set from a batch of images.

    Args:
        images: (N, H, W, C) in [0, 1] with 1 (grey), 3 (RGB) or 4 channels (alpha is ignored).
        masks: (N or 1, H', W') in [0, 1], 1 where the image is unwanted. Resized to the images.

    Raises:
        ValueError: no images, an unusable size or channel count, or values that are not finite.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"Images of shape {tuple(images.shape)} are not grey, RGB or RGBA. Connect an IMAGE output."
        )
    if images.shape[0] == 0:
        raise ValueError("The negation set has no images. Give it at least one.")
    if min(images.shape[1:3]) < MIN_SIDE:
        raise ValueError(
            f"The images are {images.shape[2]} x {images.shape[1]} pixels. "
            f"Use images of at least {MIN_SIDE} pixels a side."
        )
    count = len(images)
    if masks is not None and masks.ndim == 3 and len(masks) == 1:
        masks = masks.expand(count, -1, -1)
    if masks is not None and (masks.ndim != 3 or len(masks) != count or 0 in masks.shape):
        raise ValueError(
            f"There are {count} images but masks of shape {tuple(masks.shape)}. "
            "Connect one mask, or one per image."
        )
    converted = tuple(
        _to_bytes(image.movedim(-1, 0), f"Image {i}").movedim(0, -1).contiguous()
        for i, image in enumerate(images)
    )
    if masks is None:
        return NegationSet(converted, (None,) * count, name, source, licence)
    return NegationSet(
        converted, tuple(_mask_bytes(m, p) for m, p in zip(masks, converted)), name, source, licence
    )


def _to_bytes(image: Tensor, label: str) -> Tensor:
    """Convert (C, H, W) in [0, 1] to (3, H, W) uint8, reduced to MAX_SIDE."""
    rgb = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    scale = MAX_SIDE / max(rgb.shape[1:])
    if scale < 1:
        size = [max(MIN_SIDE, round(side * scale)) for side in rgb.shape[1:]]
        rgb = F.interpolate(rgb[None].float(), size=size, mode="area")[0]
    if not bool(torch.isfinite(rgb).all()):
        raise ValueError(f"{label} has values that are not numbers. Check the node that makes it.")
    return to_bytes(rgb.float())


def _mask_bytes(mask: Tensor, image: Tensor) -> Tensor:
    if not bool(torch.isfinite(mask).all()):
        raise ValueError("A mask has values that are not numbers. Check the node that makes it.")
    resized = F.interpolate(
        mask[None, None].float(), size=image.shape[:2], mode="bilinear", align_corners=False
    )[0, 0]
    return to_bytes(resized)


def save(negation_set: NegationSet, path: Path) -> None:
    """Write the set's file; an existing file stays whole until the new one is complete."""
    with replacing(path) as file:
        write_into(file, negation_set)


def write_into(file: BinaryIO, negation_set: NegationSet) -> None:
    """Write the content of the set's file into an open one."""
    tensors = {f"picture.{i:06}": p for i, p in enumerate(negation_set.images)}
    tensors |= {f"mask.{i:06}": m for i, m in enumerate(negation_set.masks) if m is not None}
    metadata = {
        "format": FORMAT,
        "name": negation_set.name,
        "source": negation_set.source,
        "licence": negation_set.licence,
        "content_hash": negation_set.content_hash,
    }
    tensor_file.write_into(file, tensors, metadata)


def load(path: Path) -> NegationSet:
    """Read and validate a set's file.

    Raises:
        ValueError: the file is damaged, of another format, or its parts contradict each other.
    """
    refusal = "is not a negation set. Choose a file that Build Negation Set or Save Negation Set made."
    file = tensor_file.opened(path, FORMAT, refusal)
    metadata = file.metadata
    tensors = {key: file.tensor(key) for key in sorted(file.shapes)}
    images = tuple(tensor for key, tensor in tensors.items() if key.startswith("picture."))
    masks = tuple(tensors.get(f"mask.{i:06}") for i in range(len(images)))
    expected = {f"picture.{i:06}" for i in range(len(images))} | {
        f"mask.{i:06}" for i, m in enumerate(masks) if m is not None
    }
    if expected != tensors.keys():
        raise ValueError(
            f"{path.name} has tensors that do not belong into a negation set. "
            "Build the set again from its images."
        )
    texts = (metadata.get(key, "") for key in ("name", "source", "licence"))
    try:
        return NegationSet(images, masks, *texts)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def without_duplicates(negation_set: NegationSet) -> NegationSet:
    """Return the set without repeated images. Two images are equal if all bytes of image and mask are."""
    seen: dict[bytes, int] = {}
    for index, (image, mask) in enumerate(zip(negation_set.images, negation_set.masks)):
        content = image.contiguous().numpy().tobytes() + (
            b"" if mask is None else mask.contiguous().numpy().tobytes()
        )
        seen.setdefault(hashlib.sha256(content).digest(), index)
    kept: Sequence[int] = list(seen.values())
    images, masks = tuple(negation_set.images[i] for i in kept), tuple(negation_set.masks[i] for i in kept)
    return replace(negation_set, images=images, masks=masks)


def combined(sets: Sequence[NegationSet], name: str = "") -> NegationSet:
    """Join several sets into one with all their images in order. Each source and licence is listed once."""

    def texts(values: Sequence[str]) -> str:
        return "; ".join(dict.fromkeys(value for value in values if value))

    images, masks = tuple(p for s in sets for p in s.images), tuple(m for s in sets for m in s.masks)
    return NegationSet(
        images,
        masks,
        name or texts([s.name for s in sets]),
        texts([s.source for s in sets]),
        texts([s.licence for s in sets]),
    )
