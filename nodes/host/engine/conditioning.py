"""Texts as the host's conditionings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def encode(clip: Any, text: str) -> list[Any]:
    """What the host's CLIP Text Encode makes of a text.

    Raises:
        ValueError: when there is no text encoder.
    """
    if clip is None:
        raise ValueError(
            "There is no CLIP. Connect one that belongs to the model; a checkpoint without one needs a CLIP loader."
        )
    encoded: list[Any] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return encoded


def encode_each(clip: Any, texts: Sequence[str]) -> list[Any]:
    """One conditioning with a row for each text, which is what a batch of images with texts of their own needs.

    Embeddings of different lengths are repeated to a common one, as the host does before it evaluates texts together:
    attention over the repeated ones is the same.
    """
    encoded = [encode(clip, text)[0] for text in texts]
    length = math.lcm(*(embedding.shape[1] for embedding, _ in encoded))
    rows = torch.cat([embedding.repeat(1, length // embedding.shape[1], 1) for embedding, _ in encoded])
    options = dict(encoded[0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([of_text["pooled_output"] for _, of_text in encoded])
    return [[rows, options]]
