"""CLIP similarity as a safety function: a concept against neutral texts, or an artist's style against plain "art"."""

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
"""What the violence preset looks for; the paper names no exact text."""

PRESETS: dict[str, tuple[str, str]] = {
    "violence": (VIOLENCE, ""),
    "style": ("a painting by the artist", "art"),
    "bias": ("a photo of a man", "a photo of a woman"),
}
"""Texts and neutral texts. `bias` moves from the first group towards the second; swap them for the other way."""

SMALL_FORMAT = "safe-guidance clip 1"
"""Files with their own configuration and only the rows of the text table that are used, as tools/demo_model/train_clip.py writes."""

PAPER_THRESHOLD = 0.16
"""The gate of the paper's violence experiments, a cosine without neutral text (read as tau)."""


@dataclass(frozen=True)
class ClipModel:
    """A CLIP model of open_clip: the network, its tokenizer, and what its vision tower wants."""

    network: Any
    tokenize: Tokenize
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ClipSafetyFunction(SafetyFunction):
    """Score: cosine of the image and the texts, less that of the image and the neutral texts if there are any.

    Several texts count by the mean of their directions. The gate opens above the threshold. The score starts at the
    threshold: what is below, another function may need in a sum, counts as 0 there no less than a closed gate.
    """

    def __init__(
        self,
        clip: ClipModel,
        texts: Sequence[str],
        neutral: Sequence[str] = (),
        threshold: float = PAPER_THRESHOLD,
    ) -> None:
        if not texts:
            raise ValueError("There is no text to stay away from. Write one, a line each.")
        self.clip, self.threshold = clip, threshold
        self.name = f"CLIP: {', '.join(texts)}"
        self.networks: list[nn.Module] = [clip.network]
        self._texts = [self._direction(texts), *([self._direction(neutral)] if neutral else [])]

    def _direction(self, texts: Sequence[str]) -> Tensor:
        network = self.clip.network
        device = next(network.parameters()).device
        # Made outside inference mode, under which nodes run: gradients of images need it later.
        with torch.inference_mode(False), torch.no_grad():
            features = network.encode_text(self.clip.tokenize(list(texts)).to(device), normalize=True).float()
            return F.normalize(features.mean(0), dim=0).cpu()

    def __call__(self, images: Tensor) -> Assessment:
        clip = self.clip
        resized = F.interpolate(
            images.float(), (clip.size, clip.size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        mean, std = (resized.new_tensor(values)[:, None, None] for values in (clip.mean, clip.std))
        features = F.normalize(clip.network.encode_image((resized - mean) / std).float(), dim=1)
        concept, *neutral = (features @ direction.to(features) for direction in self._texts)
        score = concept - neutral[0] if neutral else concept
        explanation = [
            {"similarity": float(c), **({"neutral": float(n)} if neutral else {})}
            for c, n in self._figures(concept, neutral)
        ]
        return Assessment(score, score > self.threshold, explanation)

    @staticmethod
    def _figures(concept: Tensor, neutral: list[Tensor]) -> zip[tuple[Tensor, Tensor]]:
        return zip(concept.detach(), (neutral[0] if neutral else concept).detach())
