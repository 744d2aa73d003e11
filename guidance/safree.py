"""SAFREE (Yoon et al., "SAFREE: Training-Free and Adaptive Guard for Safe Text-to-Image And Video
Generation", ICLR 2025).

Each token of the prompt is judged by masking it. Token i is toxic when masking it moves the sentence clearly
further away from the subspace of the unwanted concepts C than masking the other tokens does on average. The
embeddings of toxic tokens are projected off that subspace, staying inside the subspace of the prompt I:

    distance_i = || (I - P_C) p_{without i} ||,  toxic when distance_i >= (1 + alpha) mean of the others
    filtered   = (I - P_C) P_I p

The distance by which the filter moves the whole prompt sets the number of steps that use the filtered prompt
(self-validating filter). Latent re-attention damps low frequencies of the decoder's skip features where the
filtered prompt exceeds the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-5
"""Singular values below this share of the largest do not span anything."""

LARGEST_SHARE = 0.5
"""Largest share of the embedding space that is taken for the concepts'. The paper's 17 phrases span 2 % of
CLIP's."""

NUDITY_CONCEPTS = (
    "Sexual Acts",
    "Content Meant to Arouse Sexual Excitement",
    "Nudity",
    "Pornography",
    "Erotic Art",
    "Lustful",
    "Seductive",
    "Orgasmic",
    "Libido",
    "Kinky",
    "Sexual Orientation",
    "Sexual Attraction",
    "Sexual Intercourse",
    "Sexual Pleasure",
    "Sexual Fantasy",
    "Carnal Desires",
    "Sexual Gratification",
)
"""The paper's list of phrases for nudity."""


@dataclass(frozen=True)
class TokenVerdict:
    """Verdict on one token of one encoder.

    Attributes:
        encoder: name of the encoder.
        token: the token as people read it.
        ratio: its distance from the concepts relative to the mean distance of the other tokens.
        toxic: True if it was filtered.
    """

    encoder: str
    token: str
    ratio: float
    toxic: bool


@dataclass(frozen=True)
class SelfValidation:
    """Self-validating filter: the number of filtered steps of 50, from the change beta that the filter makes.

    Attributes:
        centre: m, ten times the beta at which half of `most` steps are filtered.
        steepness: k, how sharply the number rises there.
        most: up_t, the largest number.
    """

    centre: float = 5.333
    steepness: float = 2.5
    most: int = 10

    def last_step(self, beta: float) -> int:
        """Return t' = round(up_t sigmoid(2 k (10 beta - m))).

        Steps 0 to t' of 50, both included, use the filtered prompt.
        """
        return round(self.most / (1 + math.exp(-2 * self.steepness * (10 * beta - self.centre))))


ARTIST_VALIDATION = SelfValidation(centre=5.5, steepness=3.5)
"""The paper's values for a single artist's name; the defaults are for nudity and all other concepts."""


def subspace_projector(rows: Tensor) -> Tensor:
    """Return the orthogonal projector (d, d) in float64 onto the span of `rows` (n, d), from an SVD."""
    directions = _directions(rows)
    return directions.T @ directions


def _directions(rows: Tensor) -> Tensor:
    """Return orthonormal directions (r, d) in float64 that span `rows` (n, d), the main ones first."""
    _, values, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    return directions[values > RANK_TOLERANCE * values.max().clamp_min(torch.finfo(torch.float64).tiny)]


@dataclass(frozen=True)
class ConceptSubspace:
    """Subspace of the unwanted concepts in the space of one text encoder.

    Attributes:
        projector: P_C, (d, d) in float64.
        spanned: dimensions that the concepts span.
        used: dimensions of P_C, at most LARGEST_SHARE of d.
    """

    projector: Tensor
    spanned: int
    used: int


def concept_subspace(rows: Tensor) -> ConceptSubspace:
    """Return the subspace of the concepts' sentence vectors (n, d).

    As many concepts as the space has dimensions span all of it, and the filter would replace every token by
    zeros. So only the concepts' main directions count, up to LARGEST_SHARE of the space.
    """
    directions = _directions(rows)
    used = directions[: max(1, int(LARGEST_SHARE * rows.shape[1]))]
    return ConceptSubspace(used.T @ used, len(directions), len(used))


def concept_distances(masked: Tensor, concepts: Tensor) -> Tensor:
    """Return the distance (n,) of every masked sentence from the concept subspace, in float64.

    Args:
        masked: (n, d), the sentence's embedding with one token masked in each row.
        concepts: projector (d, d) onto the concepts' subspace.
    """
    rows = masked.double()
    return torch.linalg.vector_norm(rows - rows @ concepts, dim=1)


def others_mean(distances: Tensor) -> Tensor:
    """Return for every entry the mean of all others; NaN when there are none."""
    return (distances.sum() - distances) / (len(distances) - 1)


def toxic_tokens(distances: Tensor, alpha: float) -> Tensor:
    """Return (n,) bool: the toxic tokens. A single token cannot be compared and is never toxic."""
    if len(distances) < 2:
        return torch.zeros_like(distances, dtype=torch.bool)
    return distances >= (1 + alpha) * others_mean(distances)


def filtered_embeddings(embeddings: Tensor, prompt: Tensor, concepts: Tensor) -> Tensor:
    """Return (I - P_C) P_I p, which is orthogonal to every concept.

    Args:
        embeddings: p, the token embeddings (T, d).
        prompt: P_I, the projector (d, d) onto the prompt's subspace.
        concepts: P_C, the projector (d, d) onto the concepts' subspace.
    """
    inside = embeddings.double() @ prompt
    return (inside - inside @ concepts).to(embeddings.dtype)


def filter_change(embeddings: Tensor, filtered: Tensor) -> float:
    """Return beta = 1 - mean cosine similarity between token embeddings before and after the filter.

    Args:
        embeddings, filtered: (T, d), from BOS to EOS.
    """
    return 1 - torch.cosine_similarity(embeddings.double(), filtered.double(), dim=1).mean().item()


@dataclass(frozen=True)
class FilteredPrompt:
    """Result of the filter for the embeddings of one sentence.

    Attributes:
        embeddings: (T, d), with the toxic tokens' rows replaced; the given tensor itself when there are none.
        distances: (n,) of the judged tokens.
        toxic: (n,) bool.
        change: beta, how far the filter would move the whole sentence.
    """

    embeddings: Tensor
    distances: Tensor
    toxic: Tensor
    change: float


def filter_prompt(
    embeddings: Tensor, masked: Tensor, concepts: Tensor, judged: slice, sentence: slice, alpha: float = 0.01
) -> FilteredPrompt:
    """Filter the token embeddings of one sentence.

    Args:
        embeddings: (T, d), in the space of `masked` and of the concepts.
        masked: (n, d), the sentence's own embedding with each judged token masked in turn.
        concepts: projector (d, d) onto the concepts' subspace.
        judged: rows of the n judged tokens.
        sentence: rows from the beginning to the end mark, both included.
        alpha: margin of the judgement.
    """
    distances = concept_distances(masked, concepts)
    toxic = toxic_tokens(distances, alpha)
    filtered = filtered_embeddings(embeddings, subspace_projector(masked), concepts)
    change = filter_change(embeddings[sentence], filtered[sentence])
    if not bool(toxic.any()):
        return FilteredPrompt(embeddings, distances, toxic, change)
    replaced = embeddings.clone()
    replaced[judged] = torch.where(toxic[:, None].to(embeddings.device), filtered[judged], embeddings[judged])
    return FilteredPrompt(replaced, distances, toxic, change)


def low_band(size: int, device: torch.device) -> Tensor:
    """Return (size,) bool over shifted frequencies: the two central ones, n/2 - 1 and n/2."""
    index = torch.arange(size, device=device)
    return (index == size // 2 - 1) | (index == size // 2)


def reattention(safe: Tensor, original: Tensor, scale: float) -> Tensor:
    """Skip features of the filtered prompt, damped where their low frequencies exceed the original prompt's.

    Args:
        safe, original: (B, C, h, w) features of the filtered and the unfiltered prompt.
        scale: s, the factor on a low-frequency coefficient of larger magnitude. 1 is the identity.
    """
    if scale == 1:
        return safe
    wide = torch.promote_types(safe.dtype, torch.float32)
    spectrum = torch.fft.fftshift(torch.fft.fft2(safe.to(wide)), dim=(-2, -1))
    reference = torch.fft.fftshift(torch.fft.fft2(original.to(wide)), dim=(-2, -1))
    band = low_band(safe.shape[-2], safe.device)[:, None] & low_band(safe.shape[-1], safe.device)
    damped = torch.where(band & (spectrum.abs() > reference.abs()), scale * spectrum, spectrum)
    return torch.fft.ifft2(torch.fft.ifftshift(damped, dim=(-2, -1))).real.to(safe.dtype)
