"""Where a concept is, read from a diffusion model's own cross-attention with guideline tokens in place of the prompt's.

Kim et al., Detect-and-Guide (CVPR 2025), section 4.1, with the joint normalisation of Marcos-Manchón et al., Open-Vocabulary
Attention Maps (CVPR 2024). A guideline token row 0 stands for "anything else", the rows after it for the concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Normalization = Literal["joint", "per map"]

FACTORS = (2, 4)
"""Down-sampling factors of the layers that are read: 32 x 32 and 16 x 16 of a 64 x 64 latent (paper)."""


@dataclass(frozen=True)
class Queries:
    """What one cross-attention layer asks: (B, heads, height * width, head dimension), of a map of `size` (height, width)."""

    values: Tensor
    size: tuple[int, int]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., N, heads * d) -> (..., heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def token_probabilities(queries: Queries, keys: Tensor) -> Tensor:
    """How much of every position's attention each guideline token gets, averaged over heads, in float32.

    Args:
        queries: of B samples.
        keys: (heads, 1 + K, d), the layer's keys of the guideline tokens.

    Returns:
        (B, 1 + K, height, width), in [0, 1], summing to 1 over tokens: only the guideline tokens compete.
    """
    values = queries.values.float()
    scores = values @ keys.float().transpose(-1, -2) * values.shape[-1] ** -0.5
    return scores.softmax(-1).mean(1).transpose(1, 2).unflatten(-1, queries.size)


def average_over_layers(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean of the layers' maps (B, 1 + K, h_l, w_l), each brought to `size` (h, w) first: (B, 1 + K, h, w)."""
    resized = [
        m if m.shape[-2:] == size else F.interpolate(m, size=size, mode="bilinear", align_corners=False)
        for m in maps
    ]
    return torch.stack(resized).mean(0)


def against_background(maps: Tensor) -> Tensor:
    """Probability of each concept token when only it and the background token compete: (B, 1 + K, h, w) -> (B, K, h, w)."""
    background, concepts = maps[:, :1], maps[:, 1:]
    return concepts / (background + concepts).clamp_min(torch.finfo(maps.dtype).tiny)


def normalize_jointly(p: Tensor) -> Tensor:
    """Min-max over all positions of the concept's map p and the background's map 1 - p together, per sample and token.

    It keeps 1/2 in place, so that a value of at least 1/2 means p >= 1/2 and an image without the concept stays below.
    (B, K, h, w) -> same shape in [0, 1]; a map that is 1/2 everywhere gives zeros.
    """
    low = torch.minimum(p.amin((-2, -1), keepdim=True), 1 - p.amax((-2, -1), keepdim=True))
    span = 1 - 2 * low
    return torch.where(span < 1e-6, torch.zeros_like(p), (p - low) / span.clamp_min(1e-6))


def normalize_per_map(p: Tensor) -> Tensor:
    """Min-max over the positions of every map alone, as the paper literally says: its maximum is always 1."""
    low, high = p.amin((-2, -1), keepdim=True), p.amax((-2, -1), keepdim=True)
    return torch.where(high - low < 1e-6, torch.zeros_like(p), (p - low) / (high - low).clamp_min(1e-6))


def concept_probability(maps: Tensor) -> Tensor:
    """Mean over the K concept tokens of their probabilities against the background: (B, 1 + K, h, w) -> (B, 1, h, w).

    The mean is taken before normalising: it is then the mean that is compared with a threshold, and normalising stretches it
    once instead of stretching every token's map by another factor.
    """
    return against_background(maps).mean(1, keepdim=True)


def normalize(p: Tensor, normalization: Normalization = "joint") -> Tensor:
    """Either normalisation by its name."""
    return normalize_jointly(p) if normalization == "joint" else normalize_per_map(p)


def several_concepts(maps: Sequence[Tensor]) -> Tensor:
    """The strongest of several concepts at every position (paper, supplement C): (B, 1, h, w) each -> (B, 1, h, w)."""
    return torch.stack(list(maps)).amax(0)
