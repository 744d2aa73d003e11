"""Detection maps of given images, for nodes that show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.attention_maps import FACTORS
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from .capture import attention_width, family
from .given_images import record_latents


def detect(
    model: ModelPatcher,
    tokens: GuidelineTokens,
    conditioning: list[Any],
    latents: Tensor,
    sigmas: Sequence[float],
    seed: int,
) -> Tensor:
    """Return detection maps of images with added noise, as the method gets them while sampling.

    Args:
        model: a UNet model.
        tokens: of the concept to detect.
        conditioning: of the images' captions.
        latents: (N, C, h, w) in the VAE's latent space.
        sigmas: noise levels.
        seed: of the noise.

    Returns:
        (N, number of noise levels, h, w) in [0, 1]; 1/2 and above is a detection.

    Raises:
        ValueError: the tokens are for another kind of model, or the latents are not those of images.
    """
    tokens.check_fits(family(model), attention_width(model))
    if latents.ndim != 4:
        raise ValueError(
            "Detection maps are made of single images, not of videos. Connect the latent of an image."
        )
    masks = torch.zeros(len(latents), *latents.shape[-2:])
    cache = record_latents(model, latents, masks, conditioning, sigmas, tokens.layers or FACTORS, seed)
    with torch.inference_mode():
        maps = [tokens.detection(cache.maps(tokens.embeddings, level)) for level in range(len(sigmas))]
    return torch.cat(maps, dim=1)
