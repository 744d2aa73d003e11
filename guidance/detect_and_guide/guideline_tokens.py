"""Guideline tokens: the few text embeddings that say what a detector looks for, and their file.

A file is safetensors with `embeddings` (1 + K, d) and metadata; nothing in it is executed. Tokens fit the base model whose
attention they were optimised on, and models fine-tuned from it.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .attention_maps import Normalization, concept_probability, normalize

FORMAT = "safe-guidance guideline tokens 1"
MOST_TOKENS = 256
WIDEST = 16384
LAYER_NAME = re.compile(r"(input|middle|output)\.\d{1,3}\.\d{1,3}")


@dataclass(frozen=True)
class Calibration:
    """How the maps of some tokens read.

    Attributes:
        threshold: probability of the concept that separates images with it from images without.
        background: 95th percentile of the detection map where the concept is not.
    """

    threshold: float = 0.5
    background: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.threshold < 1 and 0 <= self.background <= 1):
            raise ValueError(
                f"The calibration of the guideline tokens has threshold {self.threshold:g} and background {self.background:g}. "
                "Optimise the tokens again: both lie between 0 and 1."
            )

    def apply(self, p: Tensor) -> Tensor:
        """Move the threshold to 1/2, where the method expects it: linear below it and above it, 0 and 1 stay."""
        if self.threshold == 0.5:
            return p
        below = 0.5 * p / self.threshold
        above = 0.5 + 0.5 * (p - self.threshold) / (1 - self.threshold)
        return torch.where(p < self.threshold, below, above)


@dataclass(frozen=True)
class GuidelineTokens:
    """What a detector looks for.

    Attributes:
        embeddings: (1 + K, d) float32, the background token and K tokens of the concept.
        family: the base model's name, as the host's configuration of it is called; empty when it is not known.
        words: what the tokens stand for, in words.
        name, source, licence: free text for people.
        layers: names of the cross-attention layers to read, "output.3.0" for output block 3, transformer block 0; empty for all
            at the usual scales.
        sigmas: noise levels of the optimisation; empty when there was none.
        calibration: how the maps read.
        iou: overlap of the maps with the masks on images that were held out, 0 to 1; None when none were.
    """

    embeddings: Tensor
    family: str = ""
    words: str = ""
    name: str = ""
    source: str = ""
    licence: str = ""
    layers: tuple[str, ...] = ()
    sigmas: tuple[float, ...] = ()
    calibration: Calibration = Calibration()
    iou: float | None = None

    def __post_init__(self) -> None:
        e = self.embeddings
        if e.ndim != 2 or not 2 <= len(e) <= MOST_TOKENS or not 1 <= e.shape[1] <= WIDEST:
            raise ValueError(
                f"Guideline tokens of shape {tuple(e.shape)} cannot be used. They need a background row and 1 to {MOST_TOKENS - 1} rows "
                "for the concept."
            )
        if e.dtype != torch.float32 or not bool(torch.isfinite(e).all()):
            raise ValueError(
                "The guideline tokens have values that are not finite 32-bit numbers. Optimise them again."
            )
        if not all(LAYER_NAME.fullmatch(layer) for layer in self.layers):
            raise ValueError(
                f"The guideline tokens name layers that no model has: {', '.join(self.layers)[:80]}. Optimise them again."
            )
        if not all(math.isfinite(s) and s > 0 for s in self.sigmas):
            raise ValueError(
                "The guideline tokens name noise levels that are not positive numbers. Optimise them again."
            )

    @property
    def width(self) -> int:
        """Size of a text embedding of the model they belong to."""
        return self.embeddings.shape[1]

    def check_fits(self, family: str, width: int) -> None:
        """Refuse a model of another kind.

        Raises:
            ValueError: the model's family or the width of its text embeddings differ.
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
        """Detection map (B, 1, h, w) in [0, 1] from token maps (B, 1 + K, h, w); with "joint", 1/2 is the threshold."""
        return normalize(self.calibration.apply(concept_probability(maps)), normalization)


def save(tokens: GuidelineTokens, path: Path) -> None:
    """Write the tokens' file; an existing file stays whole until the new one is complete."""
    described = {
        f.name: getattr(tokens, f.name) for f in fields(tokens) if f.name not in ("embeddings", "calibration")
    }
    metadata = {
        "format": FORMAT,
        "tokens": json.dumps({**described, "calibration": asdict(tokens.calibration)}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file({"embeddings": tokens.embeddings.detach().cpu().contiguous()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path) -> GuidelineTokens:
    """Read and validate a tokens' file.

    Raises:
        ValueError: the file is damaged, of another format, or its content does not add up.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path.name} does not hold guideline tokens. Choose a file that Optimize Guideline Tokens made and Save wrote."
                )
            if list(file.keys()) != ["embeddings"]:
                raise ValueError(
                    f"{path.name} has tensors that do not belong to guideline tokens. Optimise and save them again."
                )
            embeddings = file.get_tensor("embeddings")
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is damaged or not a safetensors file ({error}). Copy it again from its source."
        ) from error
    try:
        return _described(embeddings, json.loads(metadata.get("tokens", "")))
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path.name} has a description that cannot be read. Optimise and save the tokens again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _described(embeddings: Tensor, described: dict[str, Any]) -> GuidelineTokens:
    texts = {name: _text(described[name]) for name in ("family", "words", "name", "source", "licence")}
    iou = described["iou"]
    return GuidelineTokens(
        embeddings=embeddings,
        **texts,
        layers=tuple(_text(layer) for layer in described["layers"]),
        sigmas=tuple(float(sigma) for sigma in described["sigmas"]),
        calibration=Calibration(
            float(described["calibration"]["threshold"]), float(described["calibration"]["background"])
        ),
        iou=None if iou is None else float(iou),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def from_text(
    hidden: Tensor, start: int, end: int, words: str, whole_phrase: bool, family: str = ""
) -> GuidelineTokens:
    """Tokens that are not optimised: a text encoder's own, the start token for the background and the phrase's for the concept.

    Args:
        hidden: (T, d) hidden states of the phrase, start token first.
        start, end: rows of the phrase's word pieces, end exclusive.
        words: the phrase.
        whole_phrase: all word pieces instead of the last one, in which the others are already reflected.
        family: the base model's name, if known.
    """
    if not 0 < start < end <= len(hidden):
        raise ValueError("The phrase has no words. Write what to look for, such as 'nude person'.")
    rows = range(start, end) if whole_phrase else range(end - 1, end)
    return GuidelineTokens(hidden[[0, *rows]].float().clone(), family=family, words=words, name=words)


def named(tokens: GuidelineTokens, **texts: str) -> GuidelineTokens:
    """The tokens with other free texts."""
    return replace(tokens, **texts)  # type: ignore[arg-type]
