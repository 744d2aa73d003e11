"""Guideline tokens from words: a text encoder's own embeddings, which are not optimised."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens, from_text
from ..engine.conditioning import encode

ELSE = "background"
"""Word for everything but the concept, for encoders without a start token (ConceptAttention)."""


def tokens_from_text(clip: Any, words: str, whole_phrase: bool, family_name: str = "") -> GuidelineTokens:
    """Return tokens from a text encoder, which are not optimised.

    The background is the encoder's start token. Encoders without one, such as T5, or whose start is cut off,
    such as Qwen's, have the embedding of a word for it.

    Args:
        clip: the host's CLIP.
        words: the concept.
        whole_phrase: use all word pieces instead of the last one.
        family_name: of the model that they are for, if known.

    Raises:
        ValueError: there are no words, or no CLIP.
    """
    hidden = _hidden(clip, words)
    start, end, has_start = _word_pieces(clip, words, len(hidden))
    if has_start:
        background = hidden[0]
    else:
        of_else = _hidden(clip, ELSE)
        background = of_else[_word_pieces(clip, ELSE, len(of_else))[1] - 1]
    return from_text(hidden, background, start, end, words, whole_phrase, family_name)


def _hidden(clip: Any, words: str) -> Tensor:
    """Return the text encoder's hidden states of a phrase, (T, width)."""
    hidden: Tensor = encode(clip, words)[0][0][0]
    return hidden


def _word_pieces(clip: Any, words: str, count: int) -> tuple[int, int, bool]:
    """Return the range of a phrase's word pieces among its hidden states, and whether a start token leads.

    Args:
        clip: the host's CLIP.
        words: the phrase.
        count: number of hidden states. With several encoders, those of the last one are the last; the host
            cuts off the first ones of a chat template.
    """
    encoders = getattr(clip, "cond_stage_model", None)
    tokenized = clip.tokenize(words)
    name = next(n for n in reversed(tokenized) if getattr(encoders, n, encoders) is not None)
    phrase = [piece[0] for piece in tokenized[name][0]]
    empty = [piece[0] for piece in clip.tokenize("")[name][0]]
    shared = zip(phrase, empty)
    start = next((i for i, (a, b) in enumerate(shared) if not _same(a, b)), min(len(phrase), len(empty)))
    # The phrase ends at what follows the start of the empty one: an end token, padding or a template's rest.
    ends = (i for i in range(start, len(phrase)) if start < len(empty) and _same(phrase[i], empty[start]))
    end = next(ends, len(phrase))
    offset = count - len(phrase)
    return start + offset, end + offset, start == 1 and offset == 0


def _same(a: Any, b: Any) -> bool:
    """Return True for the same token; the pieces of an embedding file are tensors, which are no token."""
    return isinstance(a, int) and isinstance(b, int) and a == b
