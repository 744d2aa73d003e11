"""Capture of a UNet's cross-attention during the ordinary forward, which stays bit-identical.

The host gives every attn2 patch the hidden states before the query projection. A layer's name
such as "output.3.0" means transformer block 0 in output block 3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.attention_maps import (
    Queries,
    split_heads,
)
from ..engine.correction import COND, KEY
from ..engine.run import Run
from .placement import PLACES, Places, locate_rows

log = logging.getLogger(__name__)
BLOCKS = {"input": "input_blocks", "middle": "middle_block", "output": "output_blocks"}


def family(model: ModelPatcher) -> str:
    """Return the name of the model's family, which is that of the host's configuration class."""
    return type(model.model.model_config).__name__


def attention_width(model: ModelPatcher) -> int:
    """Return the width of the text embeddings that the model's cross-attention reads.

    Raises:
        ValueError: the model has no cross-attention layers of a UNet.
    """
    unet = model.model.diffusion_model
    for name in layer_names(unet):
        return int(attention_layer(unet, name).to_k.in_features)
    raise ValueError(
        f"Guideline tokens cannot be learnt from the attention of this model ({family(model)}) by this node. "
        "Make tokens for it with Guideline Tokens from Text. Optimize Guideline Tokens learns them on Stable "
        "Diffusion 1.x, 2.x, SDXL, Flux, Chroma and HunyuanVideo."
    )


def layer_names(unet: Any) -> Iterator[str]:
    """Yield the names of the cross-attention layers in running order; none for models without a UNet."""
    for side, attribute in BLOCKS.items():
        found = getattr(unet, attribute, None)
        if found is None:
            continue
        for number, block in enumerate([found] if side == "middle" else found):
            for index, transformer in enumerate(_transformers(block)):
                if getattr(transformer, "attn2", None) is not None:
                    yield f"{side}.{number}.{index}"


def attention_layer(unet: Any, name: str) -> Any:
    """Return the cross-attention module of a layer."""
    side, number, index = name.split(".")
    found = getattr(unet, BLOCKS[side])
    return _transformers(found if side == "middle" else found[int(number)])[int(index)].attn2


def _transformers(block: Any) -> list[Any]:
    layers: Any = block if isinstance(block, torch.nn.Sequential) else ()
    return next(
        (list(layer.transformer_blocks) for layer in layers if hasattr(layer, "transformer_blocks")), []
    )


@dataclass(frozen=True)
class LayerCall:
    """Call of one cross-attention layer in one forward, for the rows of one conditioning.

    Attributes:
        name: the layer's name.
        hidden: (B, height * width, channels) input of its query projection.
        size: (height, width) of the layer's map.
        latent_size: (height, width) of the evaluated latent, or of the area if the conditioning has one.
        module: the layer.
        uuid: the host's identifier of the conditioning.
        places: where the rows of the model call lie in the step's latents.
        evaluation: number of the evaluation of the positive branch, which may take several model calls.
    """

    name: str
    hidden: Tensor
    size: tuple[int, int]
    latent_size: tuple[int, int]
    module: Any
    uuid: Any
    places: Places
    evaluation: int

    @property
    def factor(self) -> int:
        """Return the ratio of the latent's width to the width of the layer's map."""
        return round(self.latent_size[-1] / self.size[-1])

    def queries(self) -> Queries:
        """Compute the layer's queries with its own weights, LoRAs included."""
        return Queries(split_heads(self.module.to_q(self.hidden), self.module.heads), self.size)

    def keys(self, embeddings: Tensor) -> Tensor:
        """Compute the keys of text embeddings (T, width), (heads, T, d)."""
        return split_heads(self.module.to_k(embeddings.to(self.hidden)[None])[0], self.module.heads)


Receiver = Callable[[LayerCall], None]


def listen(model: ModelPatcher, receiver_of: Callable[[Run], Receiver | None]) -> None:
    """Report every cross-attention layer's call while a guider evaluates its positive branch.

    Args:
        model: a clone that takes part in runs (`hooks.attach`).
        receiver_of: returns the function that gets a run's calls, or None to report nothing.
    """

    def patch(*args: Any, **options: Any) -> Any:
        # Models without a UNet would pass other arguments, but `attention_width` has raised an error for
        # them.
        hidden, context, value, extra = args
        run: Run | None = extra.get(KEY)
        receiver = receiver_of(run) if run is not None and run.own_call is not None else None
        if run is not None and receiver is not None:
            for call in _positive_calls(run, hidden, extra):
                receiver(call)
        return hidden, context, value

    locate_rows(model)
    model.set_model_attn2_patch(patch)


def _positive_calls(run: Run, hidden: Tensor, extra: dict[str, Any]) -> Iterator[LayerCall]:
    """Yield the layer call of every positive conditioning in a model call of the guider's own."""
    own, places = run.own_call, extra.get(PLACES)
    if own is None or places is None or COND not in own.conds:
        return
    positive = {entry["uuid"] for entry in own.conds[COND]}
    side, number = extra["block"]
    name = f"{side}.{number}.{extra['block_index']}"
    module = attention_layer(run.guider.inner_model.diffusion_model, name)
    size = tuple(extra["activations_shape"][-2:])
    latent_size = tuple(extra["original_shape"][-2:])
    for uuid in positive & places.rows.keys():
        of_uuid = hidden[places.rows[uuid].to(hidden.device)]  # (R, height * width, channels)
        yield LayerCall(name, of_uuid, size, latent_size, module, uuid, places, own.number)


def reads(call: LayerCall, layers: Collection[int | str]) -> bool:
    """Return True if a layer is among those chosen by name or by factor (see `LayerCall.factor`)."""
    return call.name in layers or call.factor in layers
