"""Safety function from a negation set: how much an image means what the set's images mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .embedding_density import EmbeddingDensity
from .interface import Assessment, SafetyFunction


class ImageEncoder(Protocol):
    """Encodes images as unit vectors in which distance follows what an image shows.

    Attributes:
        name: of the encoder, for people.
        networks: modules with weights.
    """

    name: str
    networks: Sequence[nn.Module]

    def __call__(self, images: Tensor) -> Tensor:
        """Return unit embeddings (B, D) float32 of images (B, 3, H, W), nominally in [0, 1]."""


@dataclass
class NegationSetSafetyFunction(SafetyFunction):
    """Scores an image by its log-odds between a negation set's unwanted and neutral images.

    The score is the part of the log-odds above the threshold, divided by the kernel's concentration. Thus it
    is zero where the gate is closed, and has the unit of CLIP's scores, a difference of cosines.

    Attributes:
        encoder: encodes the images that are scored. It must be the one that encoded the set.
        density: of the set.
        name: for people.
    """

    encoder: ImageEncoder
    density: EmbeddingDensity
    name: str = "negation set"

    def __post_init__(self) -> None:
        self.networks = self.encoder.networks

    def __call__(self, images: Tensor) -> Assessment:
        log_odds = self.density.log_odds(self.encoder(images))
        excess = log_odds - self.density.threshold
        score = excess.clamp_min(0) / self.density.concentration
        figures = torch.stack([log_odds, torch.sigmoid(log_odds)], 1).detach().tolist()  # (B, 2)
        # Without neutral images the density has no odds, only a level that compares it with the set's own.
        names = ("log odds", "probability") if self.density.neutral is not None else ("log density",)
        explanation = [dict(zip(names, of_image)) for of_image in figures]
        return Assessment(score, excess > 0, explanation)
