"""Families of transformers with separate cross-attention: the keys that their blocks make of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.cosmos.predict2
import comfy.ldm.wan.model
from torch import Tensor

from ....guidance.detect_and_guide.attention_maps import split_heads


@dataclass(frozen=True)
class CrossFamily:
    """Family of transformers whose blocks attend to the image first and then to the text.

    Attributes:
        keys: returns the keys (heads, T, d) of token embeddings (1, T, width) in a block, given by its index.
        text_width: returns the width of the text embeddings that the network reads.
        patch: returns the (frames, height, width) of a position in the latent.
    """

    keys: Callable[[Any, int, Tensor], Tensor]
    text_width: Callable[[Any], int]
    patch: Callable[[Any], tuple[int, int, int]]

    def map_size(self, network: Any, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the (frames, height, width) of the maps for a latent of this size."""
        frames, height, width = (-(-n // patch) for n, patch in zip(size, self.patch(network)))
        return frames, height, width


def _wan_keys(network: Any, index: int, tokens: Tensor) -> Tensor:
    attention = network.blocks[index].cross_attn
    keys = attention.norm_k(attention.k(network.text_embedding(tokens)))  # (1, T, heads * d)
    return split_heads(keys[0], attention.num_heads)


def _cosmos_keys(network: Any, index: int, tokens: Tensor) -> Tensor:
    attention = network.blocks[index].cross_attn
    keys: Tensor = attention.k_norm(split_heads(attention.k_proj(tokens)[0], attention.n_heads))
    return keys


FAMILIES: dict[type, CrossFamily] = {
    comfy.ldm.wan.model.WanModel: CrossFamily(
        _wan_keys,
        lambda network: int(network.text_embedding[0].in_features),
        lambda network: tuple(network.patch_size),
    ),
    comfy.ldm.cosmos.predict2.MiniTrainDIT: CrossFamily(
        _cosmos_keys,
        lambda network: int(network.blocks[0].cross_attn.k_proj.in_features),
        lambda network: (network.patch_temporal, network.patch_spatial, network.patch_spatial),
    ),
}
"""Families by the class of their network. All blocks are read, as the paper reads all layers of a size.

Anima has another class than Cosmos-Predict2: an adapter inside the model makes its text embeddings.
"""


def cross_family(network: Any) -> CrossFamily | None:
    """Return the family of a transformer with separate cross-attention; None for other networks."""
    return FAMILIES.get(type(network))
