"""SAFREE inside the host's text encoders.

Models have one to three text encoders, each with its own tokens and its own space, and each model lays their outputs out in
its own way. Here the encoders themselves are stood in for while the host encodes a text: every encoder is judged and filtered
by its own tokens in its own space, and the layout stays the host's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import node_helpers
import torch
from comfy.sd1_clip import SDClipModel
from torch import Tensor

from ....guidance.core.paper_schedule import TIMESTEPS, timestep_of_step
from ....guidance.safree import (
    ARTIST_VALIDATION,
    FilteredPrompt,
    SelfValidation,
    filter_prompt,
    subspace_projector,
)

Section = list[tuple[Any, float]]
"""Tokens of one encoder call of fixed length, with their weights."""

MASK_TOKEN = 0
"""What stands in for a masked token in the official code: "!" of CLIP, padding of T5."""


@dataclass(frozen=True)
class Judged:
    """One token of one encoder: its distance relative to the mean of the others' and whether it was filtered."""

    encoder: str
    token: str
    ratio: float
    toxic: bool


@dataclass(frozen=True)
class Filtered:
    """A prompt's conditioning through SAFREE, and why it looks as it does.

    Attributes:
        conditioning: the filtered prompt for the first steps and the prompt itself afterwards, or the prompt alone.
        plain: the prompt's own conditioning.
        judged: every token of every encoder.
        change: beta, the largest over encoders and sections.
        last_step: the last of 50 steps that uses the filtered prompt; None when all do; -1 when none does.
    """

    conditioning: list[Any]
    plain: list[Any]
    judged: list[Judged]
    change: float
    last_step: int | None


def _bounds(section: Section, encoder: SDClipModel) -> tuple[int, int]:
    """Rows of the words of a section: from behind the beginning's mark up to the end's."""
    marks = encoder.special_tokens
    tokens = [token if isinstance(token, int) else None for token, *_ in section]
    first = 1 if marks.get("start") is not None and tokens[:1] == [marks["start"]] else 0
    end = marks.get("end", marks.get("pad"))
    return first, tokens.index(end, first) if end in tokens[first:] else len(tokens)


def _sentences(encoder: SDClipModel, encode: Callable[..., Any], sections: Sequence[Section]) -> Tensor:
    """(n, d), one vector per section in the space of the encoder's token embeddings.

    CLIP's is the row of the end mark, from which its own pooled output is made; encoders without a mark at the beginning are
    bidirectional, and the mean over the words stands for the sentence.
    """
    unweighted = [[(token, 1.0) for token, *_ in section] for section in sections]
    hidden = encode(unweighted)[0]
    rows = hidden.reshape(len(sections), -1, hidden.shape[-1])
    bounds = [_bounds(section, encoder) for section in unweighted]
    if encoder.special_tokens.get("start") is not None:
        return torch.stack([row[min(end, len(row) - 1)] for row, (_, end) in zip(rows, bounds)])
    return torch.stack(
        [row[first : max(end, first + 1)].mean(dim=0) for row, (first, end) in zip(rows, bounds)]
    )


@contextmanager
def _standing_in(clip: Any, stand_in: Callable[..., Any]) -> Iterator[None]:
    """While active, every encoder of `clip` answers with `stand_in(name, encoder, its own method, sections)`."""
    encoders = {
        name: module
        for name, module in clip.cond_stage_model.named_modules()
        if isinstance(module, SDClipModel)
    }
    if not encoders:
        raise ValueError(
            "SAFREE cannot read the words of this text encoder. Use a model with CLIP or T5 encoders."
        )
    for name, encoder in encoders.items():
        encoder.encode_token_weights = functools.partial(
            stand_in, name, encoder, encoder.encode_token_weights
        )
    try:
        yield
    finally:
        for encoder in encoders.values():
            del encoder.encode_token_weights


def concept_projectors(clip: Any, concepts: Sequence[str]) -> dict[str, Tensor]:
    """By encoder, the projector onto the span of the concepts' sentence vectors."""
    rows: dict[str, list[Tensor]] = {}

    def collect(name: str, encoder: SDClipModel, encode: Callable[..., Any], sections: list[Section]) -> Any:
        rows.setdefault(name, []).append(_sentences(encoder, encode, sections[:1])[0])
        return encode(sections)

    with _standing_in(clip, collect):
        for concept in concepts:
            clip.encode_from_tokens(clip.tokenize(concept))
    return {name: subspace_projector(torch.stack(of_encoder)) for name, of_encoder in rows.items()}


class _PromptFilter:
    """Stands in for the encoders of a prompt, and keeps what it found."""

    def __init__(self, clip: Any, projectors: dict[str, Tensor], alpha: float) -> None:
        self._clip, self._projectors, self._alpha = clip, projectors, alpha
        self.judged: list[Judged] = []
        self.changes: list[float] = []

    def __call__(
        self, name: str, encoder: SDClipModel, encode: Callable[..., Any], sections: list[Section]
    ) -> Any:
        hidden, *rest = encode(sections)
        parts = hidden[0].split([len(section) for section in sections])
        filtered = [
            self._section(name, encoder, encode, section, rows) for section, rows in zip(sections, parts)
        ]
        return (torch.cat(filtered)[None], *rest)

    def _section(
        self, name: str, encoder: SDClipModel, encode: Callable[..., Any], section: Section, rows: Tensor
    ) -> Tensor:
        first, end = _bounds(section, encoder)
        if end <= first:
            return rows
        masked = [[*section[:i], (MASK_TOKEN, 1.0), *section[i + 1 :]] for i in range(first, end)]
        sentences = _sentences(encoder, encode, masked)
        found = filter_prompt(
            rows, sentences, self._projectors[name], slice(first, end), slice(0, end + 1), self._alpha
        )
        self.changes.append(found.change)
        self.judged += self._verdicts(name, section[first:end], found)
        return found.embeddings

    def _verdicts(self, name: str, words: Section, found: FilteredPrompt) -> list[Judged]:
        total, count = found.distances.sum().item(), len(words)
        return [
            Judged(
                name,
                _spelled(self._clip, name, token),
                (count - 1) * d / (total - d) if total > d else 1.0,
                bool(toxic),
            )
            for (token, *_), d, toxic in zip(words, found.distances.tolist(), found.toxic)
        ]


def _spelled(clip: Any, encoder: str, token: Any) -> str:
    """A token as people read it."""
    if not isinstance(token, int):
        return "(embedding)"
    tokenizer = getattr(clip.tokenizer, encoder.split(".")[-1], None)
    spelled = (
        str(getattr(tokenizer, "inv_vocab", {}).get(token, token)).replace("</w>", "").replace("\u2581", "")
    )
    return spelled or "(space)"


def filter_text(
    clip: Any, text: str, concepts: Sequence[str], alpha: float, validation: SelfValidation | None
) -> Filtered:
    """A prompt with the embeddings of its toxic tokens projected off the concepts.

    Args:
        clip: the host's CLIP.
        text: the prompt.
        concepts: phrases of what is unwanted.
        alpha: margin of the judgement; more filters less.
        validation: the self-validating filter, or None to use the filtered prompt at every step.
    """
    tokens = clip.tokenize(text)
    plain: list[Any] = clip.encode_from_tokens_scheduled(tokens)
    prompt_filter = _PromptFilter(clip, concept_projectors(clip, concepts), alpha)
    with _standing_in(clip, prompt_filter):
        filtered = clip.encode_from_tokens_scheduled(tokens)
    change = max(prompt_filter.changes, default=0.0)
    if not any(judged.toxic for judged in prompt_filter.judged):
        return Filtered(plain, plain, prompt_filter.judged, change, -1)
    if validation is None:
        return Filtered(filtered, plain, prompt_filter.judged, change, None)
    last = validation.last_step(change)
    return Filtered(switched(filtered, plain, last), plain, prompt_filter.judged, change, last)


def switched(first: list[Any], then: list[Any], last_step: int) -> list[Any]:
    """One conditioning up to a step of 50, both included, and another after it.

    The switch lies halfway between two steps of the papers' schedule, so that no schedule's noise level falls on it and has
    both, or none.
    """
    percent = 1 - timestep_of_step(last_step + 0.525) / (TIMESTEPS - 1)
    early = node_helpers.conditioning_set_values(first, {"start_percent": 0.0, "end_percent": percent})
    late = node_helpers.conditioning_set_values(then, {"start_percent": percent, "end_percent": 1.0})
    switched_conditioning: list[Any] = [*early, *late]
    return switched_conditioning


def validation_for(steps: str, clip: Any) -> SelfValidation | None:
    """The self-validating filter that a choice of the node means; "as published" filters all steps of models with several encoders."""
    if steps == "as published":
        several = sum(isinstance(module, SDClipModel) for module in clip.cond_stage_model.modules()) > 1
        return None if several else SelfValidation()
    return {"self-validating": SelfValidation(), "self-validating, artist": ARTIST_VALIDATION, "all": None}[
        steps
    ]
