"""SAFREE inside the host's text encoders.

Models have one to three text encoders, each with its own tokens and embedding space, and each model combines
their outputs in its own way. While the host encodes a text, functions of this module replace the encoders'
own methods. So every encoder is filtered by its own tokens in its own space, and the combination stays the
host's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import node_helpers
import torch
from comfy.sd1_clip import SDClipModel
from torch import Tensor

from ....guidance.core.paper_schedule import TIMESTEPS, timestep_of_step
from ....guidance.safree import (
    ConceptSubspace,
    FilteredPrompt,
    SelfValidation,
    TokenVerdict,
    concept_subspace,
    filter_prompt,
)

Section = list[tuple[Any, float]]
"""Tokens of one chunk of a prompt, of the encoder's fixed length, with their weights."""

MASK_TOKEN = 0
"""Token that replaces a masked token in the official code: "!" of CLIP, padding of T5."""


@dataclass(frozen=True)
class Filtered:
    """Result of the SAFREE filter on a prompt.

    Attributes:
        conditioning: the filtered prompt for the first steps and the prompt itself afterwards, or one of
            them.
        plain: the prompt's own conditioning.
        verdicts: verdicts on every token of every encoder.
        change: the paper's beta, the largest over encoders and sections.
        last_step: the last of 50 steps that uses the filtered prompt; None when all do; -1 when none does.
        limited: the concepts' subspace in every encoder where only a part of it is used, by encoder.
    """

    conditioning: list[Any]
    plain: list[Any]
    verdicts: list[TokenVerdict]
    change: float
    last_step: int | None
    limited: dict[str, ConceptSubspace] = field(default_factory=dict)


def _bounds(section: Section, encoder: SDClipModel) -> tuple[int, int]:
    """Return the range of the words in a section, after the start token and before the end token."""
    marks = encoder.special_tokens
    tokens = [token if isinstance(token, int) else None for token, *_ in section]
    first = 1 if marks.get("start") is not None and tokens[:1] == [marks["start"]] else 0
    end = marks.get("end", marks.get("pad"))
    return first, tokens.index(end, first) if end in tokens[first:] else len(tokens)


def _sentences(encoder: SDClipModel, encode: Callable[..., Any], sections: Sequence[Section]) -> Tensor:
    """Return one sentence vector per section in the space of the encoder's token embeddings, (n, d).

    For CLIP this is the embedding of the end token, from which its pooled output is made. Encoders without a
    start token are bidirectional, and the sentence vector is the mean over the words.
    """
    unweighted = [[(token, 1.0) for token, *_ in section] for section in sections]
    hidden = encode(unweighted)[0]
    embeddings = hidden.reshape(len(sections), -1, hidden.shape[-1])  # (n, tokens, d)
    bounds = [_bounds(section, encoder) for section in unweighted]
    if encoder.special_tokens.get("start") is not None:
        ends = [min(end, embeddings.shape[1] - 1) for _, end in bounds]
        return torch.stack([section[end] for section, end in zip(embeddings, ends)])
    return torch.stack(
        [
            section[first : max(end, first + 1)].mean(dim=0)
            for section, (first, end) in zip(embeddings, bounds)
        ]
    )


@contextmanager
def _replaced_encoders(clip: Any, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace every encoder's method in the block by `replacement(name, encoder, own method, sections)`."""
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
            replacement, name, encoder, encoder.encode_token_weights
        )
    try:
        yield
    finally:
        for encoder in encoders.values():
            del encoder.encode_token_weights


def concept_subspaces(clip: Any, concepts: Sequence[str]) -> dict[str, ConceptSubspace]:
    """Return the subspace of the concepts' sentence vectors, by encoder."""
    vectors: dict[str, list[Tensor]] = {}

    def collect(name: str, encoder: SDClipModel, encode: Callable[..., Any], sections: list[Section]) -> Any:
        vectors.setdefault(name, []).append(_sentences(encoder, encode, sections[:1])[0])
        return encode(sections)

    with _replaced_encoders(clip, collect):
        for concept in concepts:
            clip.encode_from_tokens(clip.tokenize(concept))
    return {name: concept_subspace(torch.stack(of_encoder)) for name, of_encoder in vectors.items()}


class _PromptFilter:
    """Replacement of a prompt's encoders that filters their embeddings and keeps the verdicts."""

    def __init__(self, clip: Any, concepts: dict[str, ConceptSubspace], alpha: float) -> None:
        self._clip, self._concepts, self._alpha = clip, concepts, alpha
        self.verdicts: list[TokenVerdict] = []
        self.changes: list[float] = []

    def __call__(
        self, name: str, encoder: SDClipModel, encode: Callable[..., Any], sections: list[Section]
    ) -> Any:
        hidden, *rest = encode(sections)
        parts = hidden[0].split([len(section) for section in sections])
        filtered = [
            self._filter(name, encoder, encode, section, embeddings)
            for section, embeddings in zip(sections, parts)
        ]
        return (torch.cat(filtered)[None], *rest)

    def _filter(
        self,
        name: str,
        encoder: SDClipModel,
        encode: Callable[..., Any],
        section: Section,
        embeddings: Tensor,
    ) -> Tensor:
        """Return the filtered embeddings of a section, (tokens, d)."""
        first, end = _bounds(section, encoder)
        if end <= first:
            return embeddings
        masked = [[*section[:i], (MASK_TOKEN, 1.0), *section[i + 1 :]] for i in range(first, end)]
        sentences = _sentences(encoder, encode, masked)
        found = filter_prompt(
            embeddings,
            sentences,
            self._concepts[name].projector,
            slice(first, end),
            slice(0, end + 1),
            self._alpha,
        )
        self.changes.append(found.change)
        self.verdicts += self._verdicts_on(name, section[first:end], found)
        return found.embeddings

    def _verdicts_on(self, name: str, words: Section, found: FilteredPrompt) -> list[TokenVerdict]:
        total, count = found.distances.sum().item(), len(words)
        return [
            TokenVerdict(
                name,
                _readable(self._clip, name, token),
                (count - 1) * d / (total - d) if total > d else 1.0,
                bool(toxic),
            )
            for (token, *_), d, toxic in zip(words, found.distances.tolist(), found.toxic)
        ]


def _readable(clip: Any, encoder: str, token: Any) -> str:
    """Return a token as people read it."""
    if not isinstance(token, int):
        return "(embedding)"
    tokenizer = getattr(clip.tokenizer, encoder.split(".")[-1], None)
    text = str(getattr(tokenizer, "inv_vocab", {}).get(token, token))
    return text.replace("</w>", "").replace("\u2581", "") or "(space)"


def filter_text(
    clip: Any, text: str, concepts: Sequence[str], alpha: float, validation: SelfValidation | None
) -> Filtered:
    """Encode a prompt, with the embeddings of its toxic tokens projected off the concepts.

    Args:
        clip: the host's CLIP.
        text: the prompt.
        concepts: phrases of unwanted concepts.
        alpha: margin above which a token is toxic; a higher value filters fewer tokens.
        validation: the self-validating filter, or None to use the filtered prompt at every step.
    """
    tokens = clip.tokenize(text)
    plain: list[Any] = clip.encode_from_tokens_scheduled(tokens)
    subspaces = concept_subspaces(clip, concepts)
    limited = {name: found for name, found in subspaces.items() if found.used < found.spanned}
    prompt_filter = _PromptFilter(clip, subspaces, alpha)
    with _replaced_encoders(clip, prompt_filter):
        filtered = clip.encode_from_tokens_scheduled(tokens)
    change = max(prompt_filter.changes, default=0.0)
    if not any(verdict.toxic for verdict in prompt_filter.verdicts):
        return Filtered(plain, plain, prompt_filter.verdicts, change, -1, limited)
    if validation is None:
        return Filtered(filtered, plain, prompt_filter.verdicts, change, None, limited)
    last = validation.last_step(change)
    return Filtered(switched(filtered, plain, last), plain, prompt_filter.verdicts, change, last, limited)


def switched(first: list[Any], then: list[Any], last_step: int) -> list[Any]:
    """Return a conditioning that is `first` up to and including a step of 50, and `then` afterwards.

    The switch lies halfway between two steps of the papers' schedule, so that no noise level falls on it and
    gets both conditionings, or none.
    """
    percent = 1 - timestep_of_step(last_step + 0.525) / (TIMESTEPS - 1)
    early = node_helpers.conditioning_set_values(first, {"start_percent": 0.0, "end_percent": percent})
    late = node_helpers.conditioning_set_values(then, {"start_percent": percent, "end_percent": 1.0})
    switched_conditioning: list[Any] = [*early, *late]
    return switched_conditioning


def has_several_encoders(clip: Any) -> bool:
    """Return True if the model has more than one text encoder, as SDXL and SD3 have."""
    return sum(isinstance(module, SDClipModel) for module in clip.cond_stage_model.modules()) > 1
