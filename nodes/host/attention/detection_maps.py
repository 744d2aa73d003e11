"""Detection maps of given images, for nodes that show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..engine.correction import Correction, RunContext, Step
from .families import check_concepts, listen_for_maps
from .given_images import evaluate_latents
from .map_collector import MapCollector


class _MapCorrection(Correction):
    """Correction that changes nothing and keeps the detection map of every evaluation.

    Args:
        tokens: of the concept to detect.
    """

    name = ""

    def __init__(self, tokens: GuidelineTokens) -> None:
        self.tokens = tokens
        self.maps: list[Tensor] = []

    def patch(self, model: ModelPatcher) -> None:
        listen_for_maps(model, [self.tokens], lambda run: run.state_of(self))

    def begin(self, context: RunContext) -> MapCollector:
        # With a two-pass method on the model a run begins twice; the second pass counts.
        self.maps.clear()
        return MapCollector((self.tokens,))

    def is_active(self, level: Any) -> bool:
        return True

    def correct(self, step: Step, state: MapCollector) -> None:
        maps = state.take(step)
        if maps is None:
            raise ValueError(
                "The model has none of the attention layers of these guideline tokens, or another node "
                "answered for it. Use tokens made for this model, and remove nodes that cache its results."
            )
        self.maps.append(self.tokens.detection(maps[0]).cpu())


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
        model: any model whose attention can be read.
        tokens: of the concept to detect.
        conditioning: of the images' captions.
        latents: (N, C, h, w) or (N, C, 1, h, w) in the VAE's latent space.
        sigmas: noise levels, as noise-to-signal ratios.
        seed: of the noise.

    Returns:
        (N, number of noise levels, h, w) in [0, 1]; 1/2 and above is a detection.

    Raises:
        ValueError: the tokens are for another kind of model, or the latents are not those of images.
    """
    check_concepts(model, [tokens])
    if latents.ndim not in (4, 5) or (latents.ndim == 5 and latents.shape[2] > 1):
        raise ValueError(
            "Detection maps are made of single images, not of videos. Connect the latent of an image."
        )

    def correction_of(batch: slice) -> _MapCorrection:
        corrections.append(_MapCorrection(tokens))
        return corrections[-1]

    corrections: list[_MapCorrection] = []
    evaluate_latents(model, correction_of, latents, conditioning, sigmas, seed)
    return torch.cat([torch.cat(correction.maps, dim=1) for correction in corrections])
