"""Capture of a UNet's cross-attention during the ordinary forward, which stays bit-identical.

The host gives every attn2 patch the hidden states before the query projection. A layer's name
such as "output.3.0" means transformer block 0 in output block 3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.attention_maps import (
    FACTORS,
    Queries,
    average_over_layers,
    split_heads,
    token_probabilities,
)
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..engine.correction import COND, KEY, Step
from ..engine.run import Run

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
        f"This model ({family(model)}) has no separate cross-attention, so guideline tokens cannot be "
        "detected in it. Use a Stable Diffusion 1.x, 2.x or SDXL model."
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
    """

    name: str
    hidden: Tensor
    size: tuple[int, int]
    latent_size: tuple[int, int]
    module: Any
    uuid: Any

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
        receiver = receiver_of(run) if run is not None and _hears_positive(run) else None
        if run is not None and receiver is not None:
            for call in _positive_calls(run, hidden, extra):
                receiver(call)
        return hidden, context, value

    model.set_model_attn2_patch(patch)


def _hears_positive(run: Run) -> bool:
    """Return True while the guider's own positive branch is evaluated."""
    return run.own_call is not None and COND in run.own_call.conds


def _positive_calls(run: Run, hidden: Tensor, extra: dict[str, Any]) -> Iterator[LayerCall]:
    """Yield the layer call of every positive conditioning in a batch of several conditionings."""
    positive = {entry["uuid"] for entry in run.guider.conds.get(COND) or ()}
    chunks = hidden.chunk(len(extra["uuids"]))  # one (B, height * width, channels) per conditioning
    for uuid, chunk in zip(extra["uuids"], chunks):
        if uuid in positive:
            side, number = extra["block"]
            name = f"{side}.{number}.{extra['block_index']}"
            module = attention_layer(run.guider.inner_model.diffusion_model, name)
            size = tuple(extra["activations_shape"][-2:])
            latent_size = tuple(extra["original_shape"][-2:])
            yield LayerCall(name, chunk, size, latent_size, module, uuid)


@dataclass
class MapCollector:
    """Collector of the token maps of one evaluation, for one or several concepts.

    Attributes:
        concepts: the guideline tokens.
        layers: token maps (B, 1 + K, height, width) by conditioning, then by concept index and layer name.
        latent_sizes: (height, width) of the evaluated latent or area, by conditioning.
    """

    concepts: tuple[GuidelineTokens, ...]
    layers: dict[Any, dict[tuple[int, str], Tensor]] = field(default_factory=dict)
    latent_sizes: dict[Any, tuple[int, int]] = field(default_factory=dict)

    def receive(self, call: LayerCall) -> None:
        """Take one layer's call. An evaluation that is made again replaces the calls of the one before."""
        wanted = [i for i, concept in enumerate(self.concepts) if reads(call, concept.layers or FACTORS)]
        if not wanted:
            return
        queries = call.queries()
        self.latent_sizes[call.uuid] = call.latent_size
        for index in wanted:
            maps = token_probabilities(queries, call.keys(self.concepts[index].embeddings))
            self.layers.setdefault(call.uuid, {})[index, call.name] = maps

    def take(self, step: Step) -> list[Tensor] | None:
        """Return the token maps (B, 1 + K, h, w) of every concept, and start over.

        Returns None if no suitable layer was called. Several positive conditionings are averaged with the
        host's own weights of their areas and masks.
        """
        layers, sizes = self.layers, self.latent_sizes
        self.layers, self.latent_sizes = {}, {}
        entries = [entry for entry in step.guider.conds.get(COND) or () if entry["uuid"] in layers]
        if not entries:
            return None
        found = []
        for index in range(len(self.concepts)):
            parts = [[m for (i, _), m in layers[e["uuid"]].items() if i == index] for e in entries]
            if not all(parts):
                return None
            averaged = [average_over_layers(part, sizes[e["uuid"]]) for part, e in zip(parts, entries)]
            whole = _covers_everything(entries, averaged, step)
            placed = averaged[0] if whole else _placed(entries, averaged, step)
            if placed is None:
                return None
            found.append(placed)
        return found


def reads(call: LayerCall, layers: Collection[int | str]) -> bool:
    """Return True if a layer is among those chosen by name or by factor (see `LayerCall.factor`)."""
    return call.name in layers or call.factor in layers


def _covers_everything(entries: list[dict[str, Any]], maps: list[Tensor], step: Step) -> bool:
    """Return True for a single conditioning without area and mask, whose maps need no placing."""
    whole = maps[0].shape[-2:] == step.x.shape[-2:] and len(maps[0]) == len(step.x)
    return whole and len(entries) == 1 and not entries[0].keys() & {"area", "mask"}


def _placed(entries: list[dict[str, Any]], maps: list[Tensor], step: Step) -> Tensor | None:
    """Return the average of the maps of areas, each at its place, with the host's weights of the areas.

    Returns None if a map does not fit its place.
    """
    timestep = step.x.new_full((len(step.x),), step.sigma)
    total = maps[0].new_zeros(len(step.x), maps[0].shape[1], *step.x.shape[-2:])
    weights = total[:, :1].clone()
    for entry, of_entry in zip(entries, maps):
        prepared = comfy.samplers.get_area_and_mult(entry, step.x, timestep)
        if (
            prepared is None
            or len(of_entry) != len(step.x)
            or of_entry.shape[-2:] != prepared.mult.shape[-2:]
        ):
            log.warning(
                "Attention maps of shape %s do not fit the image, so nothing is detected in this step.",
                tuple(of_entry.shape),
            )
            return None
        height, width, top, left = prepared.area or (*step.x.shape[-2:], 0, 0)
        weight = prepared.mult[:, :1].to(total)
        total[..., top : top + height, left : left + width] += weight * of_entry
        weights[..., top : top + height, left : left + width] += weight
    return total / weights.clamp_min(1e-6)
