"""Files of guideline tokens.

They are safetensors with `embeddings` (1 + K, d) float32 and a description as JSON in the metadata.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ..guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration
from . import finite_json, tensor_file
from .atomic_file import replacing

FORMAT = "safe-guidance guideline tokens 1"
LONGEST_DESCRIPTION = 2**18
"""Most characters of the description as JSON."""
MOST_ENTRIES = 1000
"""Most entries of a list in the description."""


def save(tokens: GuidelineTokens, path: Path) -> None:
    """Write a file of tokens; an existing file stays as it is until the new one is complete."""
    with replacing(path) as file:
        write_into(file, tokens)


def write_into(file: BinaryIO, tokens: GuidelineTokens) -> None:
    """Write the content of a file of tokens into an open one.

    Raises:
        ValueError: the tokens' texts are too long for a file that can be read again.
    """
    description = {
        field.name: getattr(tokens, field.name)
        for field in fields(tokens)
        if field.name not in ("embeddings", "calibration")
    }
    text = json.dumps({**description, "calibration": asdict(tokens.calibration)})
    if len(text) > LONGEST_DESCRIPTION:
        raise ValueError(
            "The words, the source or the licence of the guideline tokens are too long. Shorten them."
        )
    metadata = {"format": FORMAT, "tokens": text}
    tensor_file.write_into(file, {"embeddings": tokens.embeddings}, metadata)


def load(path: Path) -> GuidelineTokens:
    """Read and validate a file of tokens.

    Raises:
        ValueError: the file is damaged, has another format, or has contents that contradict each other.
    """
    embeddings, description = _read(path)
    try:
        if len(description) > LONGEST_DESCRIPTION:
            raise TypeError("too long")
        return _tokens(embeddings, _parsed(description))
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"The description in {path.name} cannot be read. Optimise and save the tokens again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _parsed(description: str) -> Any:
    """Parse JSON.

    Raises:
        TypeError: it is not JSON, is nested too deeply, or has a number of too many digits.
    """
    try:
        return finite_json.loads(description)
    except (ValueError, RecursionError) as error:
        raise TypeError("not JSON") from error


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
    iou = None if description["iou"] is None else _number(description["iou"])
    if iou is not None and not 0 <= iou <= 1:
        raise TypeError("not an overlap")
    return GuidelineTokens(
        embeddings=embeddings,
        **texts,
        layers=tuple(_text(layer) for layer in _entries(description["layers"])),
        sigmas=tuple(_number(sigma) for sigma in _entries(description["sigmas"])),
        calibration=MapCalibration(_number(calibration["threshold"]), _number(calibration["background"])),
        iou=iou,
    )


def _text(value: Any) -> str:
    """Return a text as it is.

    Raises:
        TypeError: it is not a text.
    """
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _number(value: Any) -> float:
    """Return a number as it is.

    Raises:
        TypeError: it is not a number.
        OverflowError: it is too large.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("not a number")
    return float(value)


def _entries(value: Any) -> list[Any]:
    """Return a list as it is.

    Raises:
        TypeError: it is not a list, or has more than MOST_ENTRIES entries.
    """
    if not isinstance(value, list) or len(value) > MOST_ENTRIES:
        raise TypeError("not a list")
    return value
