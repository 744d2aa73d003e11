"""Negation sets as latents in the sampler's own space, for any VAE and latent format of the host."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...guidance.negation_set import NegationSet, pixels
from ...guidance.references import References

ENCODE_BATCH = 8
KEPT_ENCODINGS = 8
"""Encoded sets kept in memory per VAE, so that queueing again costs nothing."""

RESIDENT_SHARE = 0.25
"""Share of a device's free memory that the references of one set may take; the rest is the model's."""

_encodings: weakref.WeakKeyDictionary[Any, OrderedDict[tuple[str, int, int], References]] = weakref.WeakKeyDictionary()


def encode(negation_set: NegationSet, vae: Any, height: int, width: int) -> References:
    """Latents (N, C, height, width) of the set's pictures in VAE space, half precision, with their regions.

    Pictures are scaled to cover the size that the latent stands for, keep their aspect and lose what overhangs. The host's
    VAEs encode to the posterior's mode, not to a sample of it. Progress is shown, and interrupting the prompt interrupts.
    """
    known = _encodings.setdefault(vae.first_stage_model, OrderedDict())
    key = (negation_set.content_hash, height, width)
    if key not in known:
        known[key] = _encode(negation_set, vae, height, width)
        while len(known) > KEPT_ENCODINGS:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _encode(negation_set: NegationSet, vae: Any, height: int, width: int) -> References:
    ratio = vae.spacial_compression_encode()
    progress = comfy.utils.ProgressBar(len(negation_set))
    latents: list[Tensor] = []
    regions: list[Tensor] = []
    batch: list[Tensor] = []
    for picture, mask in pixels(negation_set, height * ratio, width * ratio):
        comfy.model_management.throw_exception_if_processing_interrupted()
        batch.append(picture.movedim(0, -1))
        whole = torch.ones(1, height, width)
        regions.append(whole if mask is None else F.interpolate(mask[None], size=(height, width), mode="area")[0])
        if len(batch) == ENCODE_BATCH or len(regions) == len(negation_set):
            latents.append(vae.encode(torch.stack(batch)).to("cpu", torch.float16))
            progress.update(len(batch))
            batch = []
    masked = any(mask is not None for mask in negation_set.masks)
    return References(torch.cat(latents), torch.stack(regions).half() if masked else None)


def references_for(model: ModelPatcher, vae: Any, negation_set: NegationSet, latent_shape: tuple[int, ...]) -> References:
    """The set's references for a sampling run, in the space of the sampler's x and denoised predictions.

    Raises:
        ValueError: the run's latents are not pictures, or the VAE is not the model's.
    """
    if len(latent_shape) != 4:
        raise ValueError("Safe Denoiser compares single pictures, and this model samples video or audio. Remove the node from this MODEL.")
    latent_format = model.get_model_object("latent_format")
    height, width = latent_shape[-2:]
    encoded = encode(negation_set, vae, height, width)
    channels = encoded.latents.shape[1]
    if encoded.latents.ndim != 4 or channels != latent_format.latent_channels:
        raise ValueError(
            f"The VAE makes latents with {channels} channels, the model samples {latent_format.latent_channels}. "
            "Connect the VAE that belongs to the model."
        )
    return References(encoded.latents, encoded.regions, prepare=latent_format.process_in)


def fitting_references(references: References, device: torch.device) -> References:
    """The references in the device's own memory when they leave most of it free, else streamed there at every step."""
    if references.nbytes > RESIDENT_SHARE * comfy.model_management.get_free_memory(device):
        return references
    return references.resident(device)
