"""Families of transformers with joint attention of text and image: what a concept capture must know of each.

The host calls the blocks of all of them in the same way, so a family differs only in the layers that make its
text stream, and in the blocks whose maps are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.qwen_image.model
from torch import Tensor


@dataclass(frozen=True)
class JointFamily:
    """Family of transformers with two streams that attend jointly.

    Attributes:
        blocks: name of the network's list of blocks with two streams.
        first, last: the blocks that are read, as shares of their number.
        source: where these blocks come from.
        embed: makes the text stream (B, 1 + K, hidden) of token embeddings (B, 1 + K, width); gets the
            network, the embeddings and the timesteps (B,).
        text_layer: name of the layer that reads the text embeddings.
        run_block: runs a block, given by its index, with the host's arguments; None where that is not known,
            and guideline tokens cannot be learnt.
        temperature: divisor of the scores.
        keeps_text_length: the block has a mask of the prompt, so its text stream must be as long.
        references_first: tokens of reference images come before those of the image, not after them.
    """

    blocks: str
    first: float
    last: float
    source: str
    embed: Callable[[Any, Tensor, Tensor], Tensor]
    text_layer: str
    run_block: Callable[[Any, int, dict[str, Any]], dict[str, Any]] | None = None
    temperature: float = 1.0
    keeps_text_length: bool = False
    references_first: bool = False

    def count(self, network: Any) -> int:
        """Return the number of blocks."""
        return len(getattr(network, self.blocks))

    def read_blocks(self, network: Any) -> tuple[str, ...]:
        """Return the names of the blocks that are read without a choice, at least one."""
        count = self.count(network)
        first = min(count - 1, round(self.first * count))
        return tuple(f"double.{i}" for i in range(first, max(first + 1, round(self.last * count))))

    def text_width(self, network: Any) -> int:
        """Return the width of the text embeddings that the network reads."""
        return int(network.get_submodule(self.text_layer).in_features)

    @staticmethod
    def map_size(network: Any, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) of the maps for a latent: one position for every patch."""
        patch = network.patch_size if isinstance(network.patch_size, int) else network.patch_size[-1]
        return -(-latent_size[0] // patch), -(-latent_size[1] // patch)


def _embed_flux(network: Any, tokens: Tensor, timesteps: Tensor) -> Tensor:
    tokens = tokens if network.txt_norm is None else network.txt_norm(tokens)
    return network.txt_in(tokens)  # type: ignore[no-any-return]


def _embed_chroma(network: Any, tokens: Tensor, timesteps: Tensor) -> Tensor:
    return network.txt_in(tokens)  # type: ignore[no-any-return]


def _embed_qwen(network: Any, tokens: Tensor, timesteps: Tensor) -> Tensor:
    return network.txt_in(network.txt_norm(tokens))  # type: ignore[no-any-return]


def _embed_hunyuan(network: Any, tokens: Tensor, timesteps: Tensor) -> Tensor:
    return network.txt_in(tokens, timesteps, None)  # type: ignore[no-any-return]


def _embed_sd3(network: Any, tokens: Tensor, timesteps: Tensor) -> Tensor:
    if network.context_processor is not None:
        tokens = network.context_processor(tokens)
    return network.context_embedder(tokens)  # type: ignore[no-any-return]


def _run_flux_block(network: Any, index: int, args: dict[str, Any]) -> dict[str, Any]:
    names = ("img", "txt", "vec", "pe", "transformer_options")
    img, txt = network.double_blocks[index](**{name: args[name] for name in names})
    return {"img": img, "txt": txt}


PUBLISHED = "ConceptAttention (ICML 2025): blocks 15 to 18 of Flux.1's 19"
BY_ANALOGY = f"not published for this family; the share of {PUBLISHED}"

FAMILIES: dict[type, JointFamily] = {
    comfy.ldm.flux.model.Flux: JointFamily(
        "double_blocks", 15 / 19, 1.0, PUBLISHED, _embed_flux, "txt_in", _run_flux_block
    ),
    comfy.ldm.chroma.model.Chroma: JointFamily(
        "double_blocks", 15 / 19, 1.0, BY_ANALOGY, _embed_chroma, "txt_in", _run_flux_block
    ),
    comfy.ldm.hunyuan_video.model.HunyuanVideo: JointFamily(
        "double_blocks",
        15 / 19,
        1.0,
        BY_ANALOGY,
        _embed_hunyuan,
        "txt_in.input_embedder",
        _run_flux_block,
        references_first=True,
    ),
    comfy.ldm.qwen_image.model.QwenImageTransformer2DModel: JointFamily(
        "transformer_blocks",
        16 / 60,
        20 / 60,
        "not published for this family; as deep in the network as Flux.1's blocks 15 to 18 of 57",
        _embed_qwen,
        "txt_in",
        keeps_text_length=True,
    ),
    comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper: JointFamily(
        "joint_blocks",
        7 / 24,
        11 / 24,
        "around the expert block before the middle that Seg4Diff (NeurIPS 2025) finds in SD 3",
        _embed_sd3,
        "context_embedder",
    ),
}
"""Families by the host's class of their network. Blocks counted from 0."""

GLOBAL_MODULATION = JointFamily(
    "double_blocks",
    5 / 8,
    1.0,
    "ConceptAttention's code for Flux.2: the last three blocks, scores divided by 1000",
    _embed_flux,
    "txt_in",
    _run_flux_block,
    temperature=1000.0,
)
"""Flux.2, which has Flux.1's class and one modulation for all blocks."""


def joint_family(network: Any) -> JointFamily | None:
    """Return the family of a network with joint attention of two streams; None for other networks."""
    found = FAMILIES.get(type(network))
    if found is not None and getattr(getattr(network, "params", None), "global_modulation", False):
        return GLOBAL_MODULATION
    return found
