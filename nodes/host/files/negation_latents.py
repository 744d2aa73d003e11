"""Negation sets as latents in the sampler's own space, for any VAE and latent format of the host."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....formats.layouts import PLAIN, Layout, pixels
from ....formats.negation_set import NegationSet
from ....guidance.core.references import References
from . import latent_cache

ENCODE_BATCH = 8
KEPT_ENCODINGS = 8
"""Encoded sets kept in memory per VAE, so that queueing the workflow again reads nothing."""

RESIDENT_SHARE = 0.25
"""Share of a device's free memory that the references of one set may take; the rest is for the model."""

_encodings: weakref.WeakKeyDictionary[Any, OrderedDict[str, References]] = weakref.WeakKeyDictionary()


def encode(
    negation_set: NegationSet, vae: Any, height: int, width: int, layout: Layout = PLAIN
) -> References:
    """Return half-precision latents (N, C, height, width) of the set's images in VAE space, with regions.

    They come from disk if this VAE has encoded the set at this size before. ComfyUI's VAEs encode to the
    posterior's mode, not to a sample of it. Encoding shows its progress and can be interrupted.
    """
    known = _encodings.setdefault(vae.first_stage_model, OrderedDict())
    ratio = vae.spacial_compression_encode()
    key = f"{negation_set.content_hash} {height}x{width}x{ratio} {layout.fit} {layout.augmentation}"
    if key not in known:
        count, vae_hash = len(negation_set) * layout.copies, latent_cache.vae_hash(vae)

        def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
            return _encoded(negation_set, vae, height, width, layout)

        known[key] = (
            latent_cache.gathered(batches())
            if vae_hash is None
            else latent_cache.cached(f"{vae_hash} {key}", count, batches)
        )
        while len(known) > KEPT_ENCODINGS:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _encoded(
    negation_set: NegationSet, vae: Any, height: int, width: int, layout: Layout
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield latents and regions, one batch at a time."""
    ratio = vae.spacial_compression_encode()
    masked = any(mask is not None for mask in negation_set.masks)
    progress = comfy.utils.ProgressBar(len(negation_set) * layout.copies)
    images = pixels(negation_set, height * ratio, width * ratio, layout)
    while batch := list(islice(images, ENCODE_BATCH)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        latents = vae.encode(torch.stack([image.movedim(0, -1) for image, _ in batch])).to(
            "cpu", torch.float16
        )
        if latents.ndim != 4:
            raise ValueError(
                "The VAE makes video or audio latents, and a negation set has images. "
                "Connect the VAE of an image model."
            )
        if not bool(torch.isfinite(latents).all()):
            raise ValueError(
                "The VAE made values that are not numbers from an image of the negation set. "
                "Start the host with --fp32-vae, or use another VAE."
            )
        yield latents, torch.stack([_region(mask, height, width) for _, mask in batch]) if masked else None
        progress.update(len(batch))


def _region(mask: Tensor | None, height: int, width: int) -> Tensor:
    return (
        torch.ones(1, height, width)
        if mask is None
        else F.interpolate(mask[None], size=(height, width), mode="area")[0]
    )


def usual_size(negation_set: NegationSet, vae: Any) -> tuple[int, int]:
    """Return the most frequent image size of the set as (height, width) in latent pixels."""
    sizes = [tuple(image.shape[:2]) for image in negation_set.images]
    height, width = max(set(sizes), key=sizes.count)
    ratio = vae.spacial_compression_encode()
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def encode_images(images: Tensor, vae: Any) -> Tensor:
    """Encode a workflow's images (B, H, W, C) in [0, 1] to latents (B, C, h, w) in VAE space."""
    latents: Tensor = vae.encode(images[..., :3]).float()
    if latents.ndim != 4:
        raise ValueError(
            "The VAE makes video or audio latents, and a negation set has images. "
            "Connect the VAE of an image model."
        )
    return latents.cpu()


def references_for(
    model: ModelPatcher,
    vae: Any,
    negation_set: NegationSet,
    latent_shape: tuple[int, ...],
    layout: Layout = PLAIN,
) -> References:
    """Return the set's references for a sampling run, in the space of the sampler's x and predictions.

    Raises:
        ValueError: the VAE is not the model's.
    """
    latent_format = model.get_model_object("latent_format")
    height, width = latent_shape[-2:]
    encoded = encode(negation_set, vae, height, width, layout)
    channels = encoded.latents.shape[1]
    if channels != latent_format.latent_channels:
        raise ValueError(
            f"The VAE makes latents with {channels} channels, "
            f"the model samples {latent_format.latent_channels}. "
            "Connect the VAE that belongs to the model."
        )
    return References(encoded.latents, encoded.regions, prepare=latent_format.process_in)


def earlier_references(
    model: ModelPatcher, latents: Tensor, latent_shape: tuple[int, ...]
) -> list[References]:
    """Convert a workflow's latents to references for a sampling run; empty (all-zero) latents are left out.

    Latents of another size are scaled to cover the run's size and cropped at the centre.

    Raises:
        ValueError: they are not latents of images of this model.
    """
    latent_format = model.get_model_object("latent_format")
    if latents.ndim != 4 or latents.shape[1] != latent_format.latent_channels:
        raise ValueError(
            f"The earlier latents have the shape {tuple(latents.shape)}, "
            f"the model samples images with {latent_format.latent_channels} channels. "
            "Connect latents that this model, or one of its family, made."
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("The earlier latents have values that are not numbers. Check what made them.")
    shown = latents[latents.flatten(1).any(1)].cpu()
    if not len(shown):
        return []
    height, width = latent_shape[-2:]
    if shown.shape[-2:] != (height, width):
        shown = comfy.utils.common_upscale(shown, width, height, "bilinear", "center")
    return [References(shown, prepare=latent_format.process_in)]


def fitting_references(references: References, device: torch.device) -> References:
    """Return the references in the device's own memory if they leave most of it free.

    Otherwise return them unchanged, to be streamed to the device at every step.
    """
    if references.nbytes > RESIDENT_SHARE * comfy.model_management.get_free_memory(device):
        return references
    return references.resident(device)
