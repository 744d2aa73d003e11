"""Guideline tokens: text embeddings of a concept and its background for a model's cross-attention.

Tokens fit the base model whose attention they were optimised on, and models fine-tuned from it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_maps import Normalization, concept_probability, normalize

MOST_TOKENS = 256
"""Largest number of rows, the background included."""
WIDEST = 16384
"""Largest size of a text embedding."""
LAYER_NAME = re.compile(r"(input|middle|output)\.\d{1,3}\.\d{1,3}|(double|cross)\.\d{1,3}")


@dataclass(frozen=True)
class MapCalibration:
    """Scale of the maps that some tokens give.

    Attributes:
        threshold: probability of the concept that separates images with it from images without it.
        background: 95th percentile of the detection map at positions without the concept.
    """

    threshold: float = 0.5
    background: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.threshold < 1 and 0 <= self.background <= 1):
            raise ValueError(
                f"The calibration of the guideline tokens has threshold {self.threshold:g} and background "
                f"{self.background:g}, but both lie between 0 and 1. Optimise the tokens again."
            )

    def apply(self, p: Tensor) -> Tensor:
        """Map probabilities so that the threshold becomes 1/2: linear below and above it, 0 and 1 stay."""
        if self.threshold == 0.5:
            return p
        below = 0.5 * p / self.threshold
        above = 0.5 + 0.5 * (p - self.threshold) / (1 - self.threshold)
        return torch.where(p < self.threshold, below, above)


@dataclass(frozen=True)
class GuidelineTokens:
    """Guideline tokens of one concept.

    Attributes:
        embeddings: (1 + K, d) float32, the background token and K tokens of the concept.
        family: the base model's name, as the host names its configuration; empty when it is not known.
        words: the concept in words.
        name, source, licence: free text for people.
        layers: names of the attention layers to read, such as "output.3.0" for output block 3, transformer
            block 0 of a UNet, "double.15" for block 15 with two streams of a transformer, or "cross.15" for
            the cross-attention of its block 15; empty for the
            layers that are usual in the model's family.
        sigmas: noise levels of the optimisation; empty when there was none.
        calibration: threshold and background of the maps.
        iou: overlap of the maps with the masks of held-out images, 0 to 1; None when no image was held out.
    """

    embeddings: Tensor
    family: str = ""
    words: str = ""
    name: str = ""
    source: str = ""
    licence: str = ""
    layers: tuple[str, ...] = ()
    sigmas: tuple[float, ...] = ()
    calibration: MapCalibration = MapCalibration()
    iou: float | None = None

    def __post_init__(self) -> None:
        e = self.embeddings
        if e.ndim != 2 or not 2 <= len(e) <= MOST_TOKENS or not 1 <= e.shape[1] <= WIDEST:
            raise ValueError(
                f"Guideline tokens of shape {tuple(e.shape)} cannot be used. They need a background row and "
                f"1 to {MOST_TOKENS - 1} rows for the concept."
            )
        if e.dtype != torch.float32 or not bool(torch.isfinite(e).all()):
            raise ValueError(
                "The guideline tokens have values that are not finite 32-bit numbers. Optimise them again."
            )
        if not all(LAYER_NAME.fullmatch(layer) for layer in self.layers):
            raise ValueError(
                f"The guideline tokens name layers that no model has: {', '.join(self.layers)[:80]}. "
                "Optimise them again."
            )
        if not all(math.isfinite(s) and s > 0 for s in self.sigmas):
            raise ValueError(
                "The guideline tokens name noise levels that are not positive numbers. Optimise them again."
            )

    @property
    def width(self) -> int:
        """Return the size of a text embedding of the model that the tokens fit."""
        return self.embeddings.shape[1]

    def check_fits(self, family: str, width: int) -> None:
        """Check that the tokens fit a model.

        Args:
            family: the model's base model.
            width: the size of its text embeddings.

        Raises:
            ValueError: the family or the width differs from the tokens'.
        """
        label = f"'{self.name or self.words or 'unnamed'}'"
        if width != self.width:
            raise ValueError(
                f"The guideline tokens {label} are {self.width} wide, the model's text embeddings {width}. "
                "Use tokens that were optimised on this kind of model."
            )
        if self.family and self.family != family:
            raise ValueError(
                f"The guideline tokens {label} were made for {self.family}, the model is {family}. "
                "Use tokens that were optimised on this kind of model."
            )

    def detection(self, maps: Tensor, normalization: Normalization = "joint") -> Tensor:
        """Return the detection map (B, 1, h, w) in [0, 1] for token maps (B, 1 + K, h, w).

        With the "joint" normalisation, 1/2 is the threshold.
        """
        return normalize(self.calibration.apply(concept_probability(maps)), normalization)


def from_text(
    hidden: Tensor,
    background: Tensor,
    start: int,
    end: int,
    words: str,
    whole_phrase: bool,
    family: str = "",
) -> GuidelineTokens:
    """Return tokens that are not optimised: a text encoder's own embeddings of a phrase.

    Word pieces of the phrase become the concept's tokens.

    Args:
        hidden: (T, d) hidden states of the phrase.
        background: (d,) the background token, such as the hidden state of the start token.
        start, end: range of the phrase's word pieces, end exclusive.
        words: the phrase.
        whole_phrase: use all word pieces. Otherwise only the last one, whose embedding already reflects the
            others.
        family: the base model's name, if known.

    Raises:
        ValueError: the phrase is empty.
    """
    if not 0 <= start < end <= len(hidden):
        raise ValueError("The phrase has no words. Write what to look for, such as 'nude person'.")
    pieces = range(start, end) if whole_phrase else range(end - 1, end)
    embeddings = torch.cat([background[None], hidden[list(pieces)]]).float()
    return GuidelineTokens(embeddings, family=family, words=words, name=words)
