"""Embeddings of a negation set's images, cached on disk like its latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ....formats.negation_set import NegationSet
from ....guidance.safety_functions.negation_set import ImageEncoder
from . import latent_cache


def embed(negation_set: NegationSet, encoder: ImageEncoder) -> tuple[Tensor, Tensor | None]:
    """Return unit embeddings (N, D) of the set's unwanted images and (M, D) of its neutral ones, float32.

    Neutral images have an empty mask. Without any the second is None. The encoder must be loaded.

    Embeddings come from disk if the same weights have encoded the set before. They are ordinary tensors, so
    gradients can flow through what is computed with them.
    """
    key = f"{negation_set.content_hash} embedded by {encoder.name} {_weights(encoder)}"
    found = latent_cache.cached(key, len(negation_set), lambda: _embedded(negation_set, encoder))
    is_neutral = torch.tensor([mask is not None and not bool(mask.any()) for mask in negation_set.masks])
    with torch.inference_mode(False):
        embeddings = F.normalize(found.latents.clone().flatten(1).float(), dim=1)  # (N + M, D)
        return embeddings[~is_neutral], embeddings[is_neutral] if bool(is_neutral.any()) else None


def _weights(encoder: ImageEncoder) -> str:
    return " ".join(str(latent_cache.weights_hash(network)) for network in encoder.networks)


def _embedded(negation_set: NegationSet, encoder: ImageEncoder) -> Iterator[tuple[Tensor, None]]:
    """Yield the embedding of one image at a time as (1, D, 1, 1): images differ in size."""
    progress = comfy.utils.ProgressBar(len(negation_set))
    images: Sequence[Any] = negation_set.images
    for image in images:
        comfy.model_management.throw_exception_if_processing_interrupted()
        pixels = image.movedim(-1, 0)[None].float() / 255  # (1, 3, H, W)
        with torch.no_grad():
            yield encoder(pixels.to(_device(encoder))).cpu()[..., None, None], None
        progress.update(1)


def _device(encoder: ImageEncoder) -> torch.device:
    return next(parameter.device for network in encoder.networks for parameter in network.parameters())
