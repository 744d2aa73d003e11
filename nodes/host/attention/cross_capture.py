"""Capture of a transformer's cross-attention during the ordinary forward, which stays bit-identical.

The host's override of its attention sees the queries of every block. The mathematics is that of a UNet: the
guideline tokens take the place of the prompt's (`attention_maps`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.attention_maps import Queries, token_probabilities
from ..engine.run import Run
from .concept_stream import OVERRIDE, layout, split, token_count
from .cross_families import CrossFamily, cross_family
from .map_collector import MapCollector
from .origins import Origin, positive_origins
from .own_forwards import OwnForward, wrap_own_forwards


@dataclass
class _CrossForward:
    """One forward of the network for several conditionings.

    Attributes:
        family, network: the host's network, and what is known of its family.
        size: (frames, height, width) of the maps.
        text: number of text embeddings.
        origins: the positive conditionings.
        collector: gets the maps.
        previous: another pack's override of the attention, or None.
        self_attended: index of the last block whose self-attention was called.
    """

    family: CrossFamily
    network: Any
    size: tuple[int, int, int]
    text: int
    origins: tuple[Origin, ...]
    collector: MapCollector
    previous: Any
    self_attended: int | None = field(default=None)

    def attention(self, function: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any, **named: Any) -> Tensor:
        """Run the host's attention as it would run, and read the queries of cross-attention."""
        if self.previous is None:
            out = function(q, k, v, *others, **named)
        else:
            out = self.previous(function, q, k, v, *others, **named)
        heads, is_split = layout(*others, **named)
        index = (named.get("transformer_options") or {}).get("block_index")
        if index is not None and token_count(q, is_split) == self.size[0] * self.size[1] * self.size[2]:
            # The text may be as long as the image, so the order tells: a block attends to the image first.
            if self.self_attended != index:
                self.self_attended = index
            elif token_count(k, is_split) == self.text:
                self._read(index, split(q, heads, is_split))
        return out  # type: ignore[no-any-return]

    def _read(self, index: int, queries: Tensor) -> None:
        """Collect the maps of all concepts that read a block, from its queries (B, heads, positions, d)."""
        frames, height, width = self.size
        for number, concept in enumerate(self.collector.concepts):
            if concept.layers and f"cross.{index}" not in concept.layers:
                continue
            embeddings = concept.embeddings.to(queries)[None]
            keys = self.family.keys(self.network, index, embeddings)
            for origin in self.origins:
                flat = Queries(origin.of(queries), (frames * height, width))
                maps = token_probabilities(flat, keys)  # (R, 1 + K, frames * height, width)
                per_frame = maps.unflatten(2, (frames, height)).movedim(2, 1).flatten(0, 1)
                self.collector.add(origin, number, f"cross.{index}", per_frame)


def listen_to_cross_attention(
    model: ModelPatcher, collector_of: Callable[[Run], MapCollector | None]
) -> None:
    """Collect token maps of a transformer's cross-attention while a guider evaluates its positive branch.

    Args:
        model: a clone that takes part in runs (`hooks.attach`), of one of the families.
        collector_of: returns a run's collector, or None to collect nothing.
    """

    def options_of(forward: OwnForward) -> dict[str, Any]:
        collector = collector_of(forward.run)
        network = forward.base.diffusion_model
        family = cross_family(network)
        if collector is None or family is None or forward.text is None:
            return forward.options
        origins = positive_origins(forward.run, forward.x, forward.options)
        if not origins:
            return forward.options
        size = family.map_size(network, (forward.x.shape[2], *origins[0].latent_size))
        previous = forward.options.get(OVERRIDE)
        reading = _CrossForward(family, network, size, forward.text.shape[1], origins, collector, previous)
        return {**forward.options, OVERRIDE: reading.attention}

    wrap_own_forwards(model, options_of)
