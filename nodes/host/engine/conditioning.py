"""Encoding texts into the host's CONDITIONING."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def encode(clip: Any, text: str) -> list[Any]:
    """Return the CONDITIONING of a text, exactly as the host's CLIP Text Encode makes it.

    Raises:
        ValueError: there is no text encoder.
    """
    if clip is None:
        raise ValueError(
            "There is no CLIP. Connect one that belongs to the model. "
            "A checkpoint without a text encoder needs a CLIP loader."
        )
    encoded: list[Any] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return encoded


def encode_each(clip: Any, texts: Sequence[str]) -> list[Any]:
    """Return one CONDITIONING with a row per text, for a batch of images that each have their own text.

    Embeddings of different lengths are repeated to a common length, as the host does before it evaluates
    texts together. Attention over a repeated embedding gives the same result.
    """
    encoded = [encode(clip, text)[0] for text in texts]
    length = math.lcm(*(embedding.shape[1] for embedding, _ in encoded))
    embeddings = torch.cat(  # (number of texts, length, width)
        [embedding.repeat(1, length // embedding.shape[1], 1) for embedding, _ in encoded]
    )
    options = dict(encoded[0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([of_text["pooled_output"] for _, of_text in encoded])
    return [[embeddings, options]]
