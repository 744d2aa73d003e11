"""Concept tokens in a block with joint attention: they pass through the layers of its text stream.

The block runs for the concept tokens beside a single image token, and its attention is computed from the keys
and values of the image that were noted when the block ran for the image itself. So the image's own layers are
not evaluated again. Layers, LoRAs and quantised weights are applied by the host as always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....guidance.detect_and_guide.concept_attention import concept_outputs

OVERRIDE = "optimized_attention_override"
"""The host's key for a function that is called in place of its attention."""

MASKS = ("attn_mask", "attention_mask")
"""A block's arguments with a mask of the prompt, which the concept tokens are no part of."""

Block = Callable[[dict[str, Any]], dict[str, Any]]
"""The host's function that runs a block with a dictionary of arguments."""


@dataclass(frozen=True)
class ImageAttention:
    """Attention of the sampled image's tokens in one block.

    Attributes:
        keys, values: (B, heads, positions, d).
        outputs: (B, positions, heads * d) before the output projection.
    """

    keys: Tensor
    values: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class BlockCall:
    """Call of one block in one forward, with what is needed to run it for concept tokens.

    Attributes:
        name: the block's name, such as "double.15".
        args: the host's arguments, the image cut to its first token and the rotations to those of the first
            tokens of text and image.
        text: number of tokens of the prompt.
        image: attention of the image in this block.
        block: runs the block.
    """

    name: str
    args: dict[str, Any]
    text: int
    image: ImageAttention
    block: Block

    def pass_stream(self, stream: Tensor, keeps_text_length: bool) -> tuple[Tensor | None, Tensor | None]:
        """Pass a text stream of concept tokens through the block.

        Args:
            stream: (B, 1 + K, hidden) before the block; not changed.
            keeps_text_length: pad the stream to the length of the prompt.

        Returns:
            The stream after the block, None after a block without one; and the outputs (B, 1 + K, D) of the
            concepts' attention, None if the block has no joint attention.
        """
        count = stream.shape[1]
        length = max(count, self.text) if keeps_text_length else count
        outputs: list[Tensor] = []

        def attention(function: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any, **named: Any) -> Tensor:
            heads, is_split = layout(*others, **named)
            if token_count(k, is_split) != length + 1:
                return function(q, k, v, *others, **named)  # type: ignore[no-any-return]
            own_q = split(q, heads, is_split)[:, :, :count]
            own_k = split(k, heads, is_split)[:, :, :count]
            own_v = split(v, heads, is_split)[:, :, :count]
            outputs.append(concept_outputs(own_q, own_k, own_v, self.image.keys, self.image.values))
            return F.pad(outputs[-1], (0, 0, 0, length + 1 - count))

        # Blocks add to their streams in place. Other packs' patches of the attention have acted on the image.
        text = F.pad(stream, (0, 0, 0, length - count)).clone()
        options = {**self.args["transformer_options"], "patches": {}, OVERRIDE: attention}
        args = {**self.args, "txt": text, "img": self.args["img"].clone(), "transformer_options": options}
        if args.get("pe") is not None:
            # All concept tokens have the position of the prompt's first token, so they have no order.
            first, image = args["pe"].split(1, 2)
            args["pe"] = torch.cat([*[first] * length, image], 2)
        after = self.block(args)["txt"]
        return None if after is None else after[:, :count], outputs[-1] if outputs else None


def note_block(
    name: str, args: dict[str, Any], extra: dict[str, Any], previous: Any, image_part: slice
) -> tuple[dict[str, Any], BlockCall | None]:
    """Run a block as it would run, and note the attention of the image.

    Args:
        name: the block's name.
        args, extra: what the host gives to a replacement of the block.
        previous: another pack's replacement of it, or None.
        image_part: positions of the sampled image among the image tokens.

    Returns:
        The block's result, and its call; None if no joint attention took place, as when the block is skipped.
    """
    text, image_length = args["txt"].shape[1], args["img"].shape[1]
    first_image = args["img"][:, :1].clone()  # the block adds to the image in place
    options = args["transformer_options"]
    other_override = options.get(OVERRIDE)
    seen: list[ImageAttention] = []

    def attention(function: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any, **named: Any) -> Tensor:
        if other_override is None:
            out = function(q, k, v, *others, **named)
        else:
            out = other_override(function, q, k, v, *others, **named)
        heads, is_split = layout(*others, **named)
        if token_count(k, is_split) == text + image_length:
            keys = split(k, heads, is_split)[:, :, text:][:, :, image_part]
            values = split(v, heads, is_split)[:, :, text:][:, :, image_part]
            seen.append(ImageAttention(keys, values, out[:, text:][:, image_part]))
        return out  # type: ignore[no-any-return]

    noted = {**args, "transformer_options": {**options, OVERRIDE: attention}}
    result = extra["original_block"](noted) if previous is None else previous(noted, extra)
    if not seen:
        return result, None
    cut = {**args, "txt": None, "img": first_image, **{mask: None for mask in MASKS if mask in args}}
    if args.get("pe") is not None:
        pe = args["pe"]  # (B, 1, text + image, d / 2, 2, 2)
        cut["pe"] = torch.cat([pe[:, :, :1], pe[:, :, text : text + 1]], 2)
    return result, BlockCall(name, cut, text, seen[-1], extra["original_block"])


def layout(
    heads: int,
    mask: Any = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    *others: Any,
    **named: Any,
) -> tuple[int, bool]:
    """Return the number of heads, and True if they are split already, of a call of the host's attention."""
    return heads, skip_reshape


def split(x: Tensor, heads: int, is_split: bool) -> Tensor:
    """Return (B, heads, N, d) of a tensor of that shape or, if not `is_split`, of (B, N, heads * d).

    The latter may have its heads apart, as SD 3's values.
    """
    if is_split:
        return x
    return x.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)


def token_count(x: Tensor, is_split: bool) -> int:
    """Return the number of tokens of keys (B, heads, N, d) or (B, N, heads * d)."""
    return x.shape[2 if is_split else 1]
