"""Negation sets as latents in the sampler's own space, for any VAE and latent format of the host."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
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
from ..engine.frames import Frames, image_latents, images_in, standing_latents
from . import latent_cache

ENCODE_BATCH = 8
KEPT_ENCODINGS = 8
"""Encoded sets kept in memory per VAE, so that queueing the workflow again reads nothing."""

RESIDENT_SHARE = 0.25
"""Share of a device's free memory that the references of one set may take; the rest is for the model."""

_encodings: weakref.WeakKeyDictionary[Any, OrderedDict[str, References]] = weakref.WeakKeyDictionary()


def encode(
    negation_set: NegationSet,
    vae: Any,
    height: int,
    width: int,
    layout: Layout = PLAIN,
    in_video: bool = False,
) -> References:
    """Return half-precision latents (N, C, height, width) of the set's images in VAE space, with regions.

    With `in_video` there are two latents for every image, because a video's first latent frame holds one
    frame and the later ones several: that of the image alone, and that of the image standing still.

    They come from disk if this VAE has encoded the set at this size before. ComfyUI's VAEs encode to the
    posterior's mode, not to a sample of it. Encoding shows its progress and can be interrupted.
    """
    known = _encodings.setdefault(vae.first_stage_model, OrderedDict())
    ratio = vae.spacial_compression_encode()
    key = f"{negation_set.content_hash} {height}x{width}x{ratio} {layout.fit} {layout.augmentation}"
    key += " in a video" if in_video else ""
    if key not in known:
        count = len(negation_set) * layout.copies * (2 if in_video else 1)
        vae_hash = latent_cache.vae_hash(vae)

        def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
            return _encoded(negation_set, vae, height, width, layout, in_video)

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
    negation_set: NegationSet, vae: Any, height: int, width: int, layout: Layout, in_video: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield latents and regions, one batch at a time."""
    ratio = vae.spacial_compression_encode()
    masked = any(mask is not None for mask in negation_set.masks)
    progress = comfy.utils.ProgressBar(len(negation_set) * layout.copies)
    images = pixels(negation_set, height * ratio, width * ratio, layout)
    while batch := list(islice(images, ENCODE_BATCH)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        stacked = torch.stack([image.movedim(0, -1) for image, _ in batch])  # (n, H, W, 3)
        latents = image_latents(stacked, vae)
        regions = torch.stack([_region(mask, height, width) for _, mask in batch]) if masked else None
        if in_video:
            latents = torch.cat([latents, standing_latents(stacked, vae)])
            regions = None if regions is None else regions.repeat(2, 1, 1, 1)
        latents = latents.to("cpu", torch.float16)
        if not bool(torch.isfinite(latents).all()):
            raise ValueError(
                "The VAE made values that are not numbers from an image of the negation set. "
                "Start the host with --fp32-vae, or use another VAE."
            )
        yield latents, regions
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
    return image_latents(images[..., :3], vae).float().cpu()


def references_for(
    model: ModelPatcher,
    vae: Any,
    negation_set: NegationSet,
    frames: Frames,
    layout: Layout = PLAIN,
) -> References:
    """Return the set's references for a sampling run, in the space of the sampler's images.

    Raises:
        ValueError: the VAE is not the model's.
    """
    latent_format = model.get_model_object("latent_format")
    _, sampled, height, width = frames.image_shape
    encoded = encode(negation_set, vae, height, width, layout, in_video=frames.count > 1)
    channels = encoded.latents.shape[1]
    if channels != sampled:
        raise ValueError(
            f"The VAE makes latents with {channels} channels, the model samples {sampled}. "
            "Connect the VAE that belongs to the model."
        )
    return References(encoded.latents, encoded.regions, prepare=partial(images_in, latent_format))


def earlier_references(model: ModelPatcher, latents: Tensor, frames: Frames) -> list[References]:
    """Convert a workflow's latents to references for a sampling run; empty (all-zero) latents are left out.

    Latents of another size are scaled to cover the run's size and cropped at the centre.

    Raises:
        ValueError: they are not latents of images of this model.
    """
    latent_format = model.get_model_object("latent_format")
    _, channels, height, width = frames.image_shape
    if latents.ndim not in (4, 5) or latents.shape[1] != channels:
        raise ValueError(
            f"The earlier latents have the shape {tuple(latents.shape)}, "
            f"the model samples images with {channels} channels. "
            "Connect latents that this model, or one of its family, made."
        )
    latents = Frames.of([latents.shape]).images(latents)
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("The earlier latents have values that are not numbers. Check what made them.")
    shown = latents[latents.flatten(1).any(1)].cpu()
    if not len(shown):
        return []
    if shown.shape[-2:] != (height, width):
        shown = comfy.utils.common_upscale(shown, width, height, "bilinear", "center")
    return [References(shown, prepare=partial(images_in, latent_format))]


def fitting_references(references: References, device: torch.device) -> References:
    """Return the references in the device's own memory if they leave most of it free.

    Otherwise return them unchanged, to be streamed to the device at every step.
    """
    if references.nbytes > RESIDENT_SHARE * comfy.model_management.get_free_memory(device):
        return references
    return references.resident(device)
