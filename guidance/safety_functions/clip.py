"""Safety function from CLIP similarity, for a concept or an artist's style against neutral texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .interface import Assessment, SafetyFunction

Tokenize = Callable[[list[str]], Tensor]

VIOLENCE = "violence, blood, gore, a fight, a weapon"
"""Text of the violence preset; the paper gives no exact text."""

PRESETS: dict[str, tuple[str, str]] = {
    "violence": (VIOLENCE, ""),
    "style": ("a painting by the artist", "art"),
    "bias": ("a photo of a man", "a photo of a woman"),
}
"""Texts and neutral texts.

`bias` moves from the first group towards the second; swap them for the opposite direction.
"""

PAPER_THRESHOLD = 0.16
"""Threshold of the paper's violence experiments, for a cosine without neutral text (its tau)."""

EVEN = 0.0
"""Threshold for a difference of two cosines: the image resembles the texts as much as the neutral texts."""


def usual_threshold(has_neutral: bool) -> float:
    """Return the threshold to begin with: the paper's for a cosine, EVEN for a difference of two cosines."""
    return EVEN if has_neutral else PAPER_THRESHOLD


@dataclass(frozen=True)
class ClipModel:
    """A CLIP model of open_clip.

    Attributes:
        network: with `encode_image` and `encode_text`.
        tokenize: texts to token numbers (n, length).
        size: side in pixels of the vision tower's input.
        mean, std: with which its input is normalised, per channel.
    """

    network: Any
    tokenize: Tokenize
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def embed(self, images: Tensor) -> Tensor:
        """Return unit features (B, width) float32 of images (B, 3, H, W), nominally in [0, 1]."""
        resized = F.interpolate(
            images.float(), (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        mean = resized.new_tensor(self.mean)[:, None, None]
        std = resized.new_tensor(self.std)[:, None, None]
        return F.normalize(self.network.encode_image((resized - mean) / std).float(), dim=1)


class ClipSafetyFunction(SafetyFunction):
    """Measures an image's cosine with the texts, minus that with the neutral texts if there are any.

    Several texts are represented by the mean of their directions. The gate opens above the threshold. The
    score is the excess over the threshold: 0 where the gate opens, and 0 below.

    Args:
        clip: the model.
        texts: the unwanted concept.
        neutral: texts that the concept is compared with.
        threshold: measure above which the gate opens.

    Raises:
        ValueError: there is no text.
    """

    def __init__(
        self,
        clip: ClipModel,
        texts: Sequence[str],
        neutral: Sequence[str] = (),
        threshold: float = PAPER_THRESHOLD,
    ) -> None:
        if not texts:
            raise ValueError("The safety function has no text. Write one text per line.")
        self.clip, self.threshold = clip, threshold
        self.name = f"CLIP: {', '.join(texts)}"
        self.networks: list[nn.Module] = [clip.network]
        self._texts = [self._direction(texts), *([self._direction(neutral)] if neutral else [])]

    def _direction(self, texts: Sequence[str]) -> Tensor:
        """Return the unit mean direction (width,) of some texts."""
        network = self.clip.network
        device = next(network.parameters()).device
        # Nodes run under inference mode. Gradients of images need these directions, so leave it.
        with torch.inference_mode(False), torch.no_grad():
            features = network.encode_text(self.clip.tokenize(list(texts)).to(device), normalize=True).float()
            return F.normalize(features.mean(0), dim=0).cpu()

    def __call__(self, images: Tensor) -> Assessment:
        features = self.clip.embed(images)
        cosines = [features @ direction.to(features) for direction in self._texts]  # (B,) each
        measure = cosines[0] - cosines[1] if len(cosines) == 2 else cosines[0]
        names = ("similarity", "neutral")
        figures = torch.stack(cosines, 1).detach().tolist()  # (B, 1 or 2)
        explanation = [dict(zip(names, of_image)) for of_image in figures]
        score = (measure - self.threshold).clamp_min(0)
        return Assessment(score, measure > self.threshold, explanation, measure=measure.detach())
