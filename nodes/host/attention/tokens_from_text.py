"""Guideline tokens from words: a text encoder's own embeddings, which are not optimised."""

from __future__ import annotations

from typing import Any

from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens, from_text
from ..engine.conditioning import encode


def tokens_from_text(clip: Any, words: str, whole_phrase: bool, family_name: str = "") -> GuidelineTokens:
    """Return tokens from a text encoder, which are not optimised.

    Args:
        clip: the host's CLIP.
        words: the concept.
        whole_phrase: use all word pieces instead of the last one.
        family_name: of the model that they are for, if known.

    Raises:
        ValueError: there are no words, or no CLIP.
    """
    hidden = encode(clip, words)[0][0][0]
    pieces = _word_pieces(clip, words)
    return from_text(hidden, 1, 1 + pieces, words, whole_phrase, family_name)


def _word_pieces(clip: Any, words: str) -> int:
    """Return the number of word pieces that the first tokenizer makes of a phrase."""

    def tokens(text: str) -> list[Any]:
        return [piece[0] for piece in next(iter(clip.tokenize(text).values()))[0]]

    empty = tokens("")
    phrase = tokens(words)
    end, padding = empty[1], empty[-1]
    # The phrase ends at the first end token or padding after the start token.
    ends = (i for i, token in enumerate(phrase) if i > 0 and (token == end or token == padding))
    return next(ends, len(phrase)) - 1
