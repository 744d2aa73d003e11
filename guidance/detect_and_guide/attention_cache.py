"""What a model's cross-attention asked while it looked at images: all that guideline tokens are learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_maps import Queries, against_background, average_over_layers, split_heads, token_probabilities


@dataclass(frozen=True)
class AttentionCache:
    """What some cross-attention layers asked while a model looked at images.

    Attributes:
        layers: names of the layers.
        key_weights: per layer (heads * d, width of a text embedding).
        queries: per noise level, per layer, (N, heads, h_l * w_l, d).
        sizes: per layer (h_l, w_l).
        sigmas: the noise levels.
        masks: (N, h, w) bool, where the concept is; all False for a safe image.
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
        """(h, w) of the masks and maps."""
        return self.masks.shape[-2], self.masks.shape[-1]

    def images(self, rows: Sequence[int]) -> AttentionCache:
        """The cache of some images only."""
        chosen = torch.tensor(list(rows), dtype=torch.long)
        queries = tuple(tuple(q[chosen] for q in level) for level in self.queries)
        return replace(self, queries=queries, masks=self.masks[chosen])

    def with_masks(self, masks: Tensor) -> AttentionCache:
        """The same images with masks (N, H, W) in [0, 1] of any size: a position is masked where more than half of it is."""
        small = F.interpolate(masks[:, None].float(), size=self.size, mode="area")[:, 0]
        return replace(self, masks=small > 0.5)

    def maps(self, embeddings: Tensor, level: int, rows: Tensor | slice = slice(None)) -> Tensor:
        """Token maps (n, 1 + K, h, w) at one of the noise levels; differentiable in `embeddings`."""
        layers = []
        for weight, queries, size in zip(self.key_weights, self.queries[level], self.sizes):
            keys = split_heads(F.linear(embeddings, weight), queries.shape[1])
            layers.append(token_probabilities(Queries(queries[rows], size), keys))
        return average_over_layers(layers, self.size)

    def probabilities(self, embeddings: Tensor, level: int, rows: Tensor | slice = slice(None)) -> Tensor:
        """Probabilities (n, K, h, w) of the concept tokens against the background."""
        return against_background(self.maps(embeddings, level, rows))
