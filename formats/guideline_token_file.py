"""Files of guideline tokens.

They are safetensors with `embeddings` (1 + K, d) float32 and a description as JSON in the metadata.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration
from . import tensor_file

FORMAT = "safe-guidance guideline tokens 1"


def save(tokens: GuidelineTokens, path: Path) -> None:
    """Write a file of tokens; an existing file stays as it is until the new one is complete."""
    description = {
        field.name: getattr(tokens, field.name)
        for field in fields(tokens)
        if field.name not in ("embeddings", "calibration")
    }
    metadata = {
        "format": FORMAT,
        "tokens": json.dumps({**description, "calibration": asdict(tokens.calibration)}),
    }
    tensor_file.write(path, {"embeddings": tokens.embeddings}, metadata)


def load(path: Path) -> GuidelineTokens:
    """Read and validate a file of tokens.

    Raises:
        ValueError: the file is damaged, has another format, or has contents that contradict each other.
    """
    embeddings, description = _read(path)
    try:
        return _tokens(embeddings, json.loads(description))
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The description in {path.name} cannot be read. Optimise and save the tokens again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _read(path: Path) -> tuple[Tensor, str]:
    """Return the embeddings and their description as JSON text."""
    refusal = "does not hold guideline tokens. Choose a file that Save Guideline Tokens has written."
    file = tensor_file.opened(path, FORMAT, refusal)
    if list(file.shapes) != ["embeddings"]:
        raise ValueError(
            f"{path.name} has tensors that do not belong to guideline tokens. "
            "Optimise and save the tokens again."
        )
    return file.tensor("embeddings"), file.metadata.get("tokens", "")


def _tokens(embeddings: Tensor, description: dict[str, Any]) -> GuidelineTokens:
    """Return the tokens with the description's entries, each checked for its type."""
    texts = {name: _text(description[name]) for name in ("family", "words", "name", "source", "licence")}
    calibration = description["calibration"]
    iou = description["iou"]
    return GuidelineTokens(
        embeddings=embeddings,
        **texts,
        layers=tuple(_text(layer) for layer in description["layers"]),
        sigmas=tuple(float(sigma) for sigma in description["sigmas"]),
        calibration=MapCalibration(float(calibration["threshold"]), float(calibration["background"])),
        iou=None if iou is None else float(iou),
    )


def _text(value: Any) -> str:
    """Return a text as it is.

    Raises:
        TypeError: it is not a text.
    """
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value
