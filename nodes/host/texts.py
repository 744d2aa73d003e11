"""Texts as the host's conditionings."""

from __future__ import annotations

from typing import Any


def encode(clip: Any, text: str) -> list[Any]:
    """What the host's CLIP Text Encode makes of a text.

    Raises:
        ValueError: when there is no text encoder.
    """
    if clip is None:
        raise ValueError("There is no CLIP. Connect one that belongs to the model; a checkpoint without one needs a CLIP loader.")
    encoded: list[Any] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return encoded
