"""Cached cross-attention queries of given images, from which guideline tokens are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_maps import Queries, against_background, average_over_layers, split_heads, token_probabilities


class MapSource(Protocol):
    """Images at some noise levels whose token maps can be computed for any embeddings.

    Attributes are those of `AttentionCache`.
    """

    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def sigmas(self) -> tuple[float, ...]: ...
    @property
    def masks(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> MapSource:
        """Return the source of some of the images."""

    def probabilities(self, embeddings: Tensor, level: int, indices: Tensor | slice = slice(None)) -> Tensor:
        """Return probabilities (n, K, h, w) of each concept token, differentiable in the embeddings."""


@dataclass(frozen=True)
class AttentionCache:
    """Queries of some cross-attention layers, recorded while a model denoised N images.

    Attributes:
        layers: names of the layers.
        key_weights: per layer (heads * d, width of a text embedding).
        queries: per noise level, per layer, (N, heads, h_l * w_l, d).
        sizes: per layer (h_l, w_l).
        sigmas: the noise levels.
        masks: (N, h, w) bool, True where the concept is; all False for a safe image.
    """

    layers: tuple[str, ...]
    key_weights: tuple[Tensor, ...]
    queries: tuple[tuple[Tensor, ...], ...]
    sizes: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]
    masks: Tensor

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def size(self) -> tuple[int, int]:
        """Return (h, w) of the masks and maps."""
        return self.masks.shape[-2], self.masks.shape[-1]

    @property
    def width(self) -> int:
        """Return the width of a text embedding."""
        return self.key_weights[0].shape[1]

    def images(self, indices: Sequence[int]) -> AttentionCache:
        """Return the cache of some of the images."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        queries = tuple(tuple(q[chosen] for q in level) for level in self.queries)
        return replace(self, queries=queries, masks=self.masks[chosen])

    def with_masks(self, masks: Tensor) -> AttentionCache:
        """Return the same images with masks (N, H, W) in [0, 1] of any size.

        A position of the cache is masked where the mask covers more than half of it.
        """
        small = F.interpolate(masks[:, None].float(), size=self.size, mode="area")[:, 0]  # (N, h, w)
        return replace(self, masks=small > 0.5)

    def maps(self, embeddings: Tensor, level: int, indices: Tensor | slice = slice(None)) -> Tensor:
        """Return token maps (n, 1 + K, h, w) of some images at one noise level.

        They are differentiable in `embeddings`.

        Args:
            embeddings: (1 + K, width of a text embedding).
            level: number of the noise level.
            indices: of the n images; all by default.
        """
        layers = []
        for weight, queries, size in zip(self.key_weights, self.queries[level], self.sizes):
            keys = split_heads(F.linear(embeddings, weight), queries.shape[1])  # (heads, 1 + K, d)
            layers.append(token_probabilities(Queries(queries[indices], size), keys))
        return average_over_layers(layers, self.size)

    def probabilities(self, embeddings: Tensor, level: int, indices: Tensor | slice = slice(None)) -> Tensor:
        """Return probabilities (n, K, h, w) of each concept token against the background token."""
        return against_background(self.maps(embeddings, level, indices))
