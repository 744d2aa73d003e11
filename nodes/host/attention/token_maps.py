"""Token maps of one evaluation, whichever attention they come from, placed in the latent."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
from torch import Tensor

from ....guidance.detect_and_guide.attention_maps import FACTORS, average_over_layers, token_probabilities
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..engine.correction import COND, Step
from .capture import LayerCall, reads

log = logging.getLogger(__name__)


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
        for index in wanted:
            maps = token_probabilities(queries, call.keys(self.concepts[index].embeddings))
            self.add(call.uuid, index, call.name, maps, call.latent_size)

    def add(self, uuid: Any, index: int, layer: str, maps: Tensor, latent_size: tuple[int, int]) -> None:
        """Add one layer's token maps of a concept, given by its index, for a conditioning."""
        self.latent_sizes[uuid] = latent_size
        self.layers.setdefault(uuid, {})[index, layer] = maps

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
