"""Detection maps: the position of a concept, read from cross-attention with guideline tokens.

The guideline tokens take the place of the prompt's. Li et al., Detect-and-Guide (CVPR 2025), section 3.1,
with the joint normalisation of Marcos-Manchón et al., Open-Vocabulary Attention Maps (CVPR 2024). The first
guideline token stands for the background, which is "anything else"; the tokens after it stand for the
concept.
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
    """Queries of one cross-attention layer.

    Attributes:
        values: (B, heads, height * width, d), d the dimension of a head.
        size: (height, width) of the layer's feature map.
    """

    values: Tensor
    size: tuple[int, int]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return (..., N, heads * d) as (..., heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def token_probabilities(queries: Queries, keys: Tensor) -> Tensor:
    """Return each guideline token's share of the attention at every position, averaged over heads.

    Args:
        queries: of B samples.
        keys: (heads, 1 + K, d), the layer's keys of the guideline tokens.

    Returns:
        (B, 1 + K, height, width) float32, in [0, 1], summing to 1 over tokens: only the guideline tokens
        compete.
    """
    values = queries.values.float()
    scores = values @ keys.float().transpose(-1, -2) * values.shape[-1] ** -0.5  # (B, heads, h w, 1 + K)
    mean = scores.softmax(-1).mean(1)  # (B, h w, 1 + K)
    return mean.transpose(1, 2).unflatten(-1, queries.size)  # (B, 1 + K, h, w)


def average_over_layers(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return the mean (B, 1 + K, h, w) of the layers' maps (B, 1 + K, h_l, w_l), resized to `size` (h, w)."""
    resized = [
        m if m.shape[-2:] == size else F.interpolate(m, size=size, mode="bilinear", align_corners=False)
        for m in maps
    ]
    return torch.stack(resized).mean(0)


def against_background(maps: Tensor) -> Tensor:
    """Return each concept token's probability against the background: (B, 1 + K, h, w) -> (B, K, h, w)."""
    background, concepts = maps[:, :1], maps[:, 1:]
    return concepts / (background + concepts).clamp_min(torch.finfo(maps.dtype).tiny)


def normalize_jointly(p: Tensor) -> Tensor:
    """Rescale the concept's map p and the background's 1 - p to [0, 1] by a common minimum and maximum.

    The value 1/2 stays 1/2. So a normalised value of at least 1/2 means p >= 1/2, and an image without the
    concept stays below 1/2 everywhere. Every sample and token has its own minimum and maximum.

    Args:
        p: (B, K, h, w).

    Returns:
        (B, K, h, w) in [0, 1]; zeros for a map that is 1/2 everywhere.
    """
    low = torch.minimum(p.amin((-2, -1), keepdim=True), 1 - p.amax((-2, -1), keepdim=True))  # (B, K, 1, 1)
    span = 1 - 2 * low
    return torch.where(span < 1e-6, torch.zeros_like(p), (p - low) / span.clamp_min(1e-6))


def normalize_per_map(p: Tensor) -> Tensor:
    """Rescale every map (B, K, h, w) to [0, 1] by its own minimum and maximum, as the paper does."""
    low, high = p.amin((-2, -1), keepdim=True), p.amax((-2, -1), keepdim=True)  # (B, K, 1, 1)
    return torch.where(high - low < 1e-6, torch.zeros_like(p), (p - low) / (high - low).clamp_min(1e-6))


def concept_probability(maps: Tensor) -> Tensor:
    """Return the concept tokens' mean probability against the background: (B, 1 + K, h, w) -> (B, 1, h, w).

    The mean is taken before normalisation. So the mean is compared with the threshold, and it is rescaled
    once; otherwise each token's map would be rescaled by a different factor.
    """
    return against_background(maps).mean(1, keepdim=True)


def normalize(p: Tensor, normalization: Normalization = "joint") -> Tensor:
    """Normalise maps with the normalisation of that name."""
    return normalize_jointly(p) if normalization == "joint" else normalize_per_map(p)


def several_concepts(maps: Sequence[Tensor]) -> Tensor:
    """Return the maximum of several concepts' maps (B, 1, h, w) at every position (paper, supplement C)."""
    return torch.stack(list(maps)).amax(0)
