"""Token maps of one evaluation, put together from the model calls that made it: areas, windows and tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ....guidance.detect_and_guide.attention_maps import FACTORS, average_over_layers, token_probabilities
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..engine.correction import COND, Step
from .capture import LayerCall, reads
from .origins import Origin
from .placement import Places

LEAST_COVERED = 0.98
"""Share of the positive branch's positions that must be heard for a detection."""


@dataclass
class _Piece:
    """Token maps of one conditioning in one model call.

    Attributes:
        latent_size: (height, width) of the evaluated latents.
        positions: (R, height, width) where they lie in the step's latents.
        is_whole: True for all of the step's latents in order.
        maps: (R, 1 + K, h, w) by concept index and layer name.
    """

    latent_size: tuple[int, int]
    positions: Tensor
    is_whole: bool
    maps: dict[tuple[int, str], Tensor] = field(default_factory=dict)


@dataclass
class MapCollector:
    """Collector of the token maps of one evaluation, for one or several concepts.

    Attributes:
        concepts: the guideline tokens.
        unheard: evaluations of which no suitable layer was heard.
        unplaced: evaluations of which too little could be placed in the image.
    """

    concepts: tuple[GuidelineTokens, ...]
    unheard: int = 0
    unplaced: int = 0
    _pieces: dict[tuple[Any, Places], _Piece] = field(default_factory=dict)
    _evaluation: int = 0

    def receive(self, call: LayerCall) -> None:
        """Take the call of one layer of cross-attention."""
        wanted = [i for i, concept in enumerate(self.concepts) if reads(call, concept.layers or FACTORS)]
        if not wanted:
            return
        queries = call.queries()
        for index in wanted:
            maps = token_probabilities(queries, call.keys(self.concepts[index].embeddings))
            self.add(
                Origin(call.uuid, call.places, call.evaluation, call.latent_size), index, call.name, maps
            )

    def add(self, origin: Origin, index: int, layer: str, maps: Tensor) -> None:
        """Add the token maps (R, 1 + K, h, w) of a concept, given by its index, in one layer.

        An evaluation that is made again replaces the maps of the one before.
        """
        if origin.evaluation != self._evaluation:
            self._pieces, self._evaluation = {}, origin.evaluation
        key = origin.uuid, origin.places
        if key not in self._pieces:
            positions = origin.places.positions[origin.uuid]
            self._pieces[key] = _Piece(origin.latent_size, positions, origin.places.is_whole)
        self._pieces[key].maps[index, layer] = maps

    def take(self, step: Step) -> list[Tensor] | None:
        """Return the token maps (B, 1 + K, h, w) of every concept, and start over.

        Returns None if no suitable layer was called, or if what was heard does not cover the image. Several
        positive conditionings are averaged with the host's own weights of their areas and masks.
        """
        pieces: dict[Any, list[_Piece]] = {}
        for (uuid, _), piece in self._pieces.items():
            pieces.setdefault(uuid, []).append(piece)
        self._pieces = {}
        entries = [entry for entry in step.guider.conds.get(COND) or () if entry["uuid"] in pieces]
        if not entries:
            self.unheard += 1
            return None
        found = []
        for index in range(len(self.concepts)):
            maps = _put_together(index, entries, pieces, step)
            if maps is None:
                self.unplaced += 1
                return None
            found.append(maps)
        return found


def _put_together(
    index: int, entries: list[dict[str, Any]], pieces: dict[Any, list[_Piece]], step: Step
) -> Tensor | None:
    """Return the maps (B, 1 + K, h, w) of one concept, or None if too little of the image was heard."""
    averaged = [[(_of_concept(piece, index), piece) for piece in pieces[entry["uuid"]]] for entry in entries]
    if any(maps is None for of_entry in averaged for maps, _ in of_entry):
        return None
    (first, piece), *others = [pair for of_entry in averaged for pair in of_entry]
    if not others and piece.is_whole and not entries[0].keys() & {"area", "mask"}:
        return first
    assert first is not None
    total = first.new_zeros(len(step.x), first.shape[1], *step.x.shape[-2:])
    weights, expected = total[:, :1].clone(), total[:, :1].clone()
    for entry, of_entry in zip(entries, averaged):
        maps, heard = _placed(of_entry, total)
        weight = _weight(entry, step).to(total)
        total += weight * heard * maps
        weights += weight * heard
        expected += weight
    is_heard = (weights > 0)[expected > 0].float().mean()
    return total / weights.clamp_min(1e-6) if float(is_heard) >= LEAST_COVERED else None


def _of_concept(piece: _Piece, index: int) -> Tensor | None:
    """Return a piece's maps of one concept, averaged over its layers, (R, 1 + K, height, width)."""
    layers = [maps for (concept, _), maps in piece.maps.items() if concept == index]
    return average_over_layers(layers, piece.latent_size) if layers else None


def _placed(of_entry: list[tuple[Tensor | None, _Piece]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of a conditioning's pieces at every position, and where there is any (0 or 1)."""
    batch, tokens, height, width = like.shape
    total = like.new_zeros(batch * height * width, tokens)
    count = like.new_zeros(batch * height * width, 1)
    for maps, piece in of_entry:
        assert maps is not None
        positions = piece.positions.flatten().to(like.device)
        known = positions >= 0
        values = maps.movedim(1, -1).reshape(-1, tokens)[known]
        total.index_add_(0, positions[known], values)
        count.index_add_(0, positions[known], torch.ones_like(values[:, :1]))
    shape = (batch, height, width, -1)
    mean = (total / count.clamp_min(1)).view(shape).movedim(-1, 1)
    return mean, (count > 0).to(like).view(shape).movedim(-1, 1)


def _weight(entry: dict[str, Any], step: Step) -> Tensor:
    """Return the host's weight of a conditioning at every position, (F, 1, h, w)."""
    weight = torch.zeros_like(step.latent[:, :1])
    timestep = step.latent.new_full((len(step.latent),), step.sigma)
    prepared = comfy.samplers.get_area_and_mult(entry, step.latent, timestep)
    if prepared is not None:
        part, dims = weight, step.latent.ndim - 2
        for dim, size in enumerate((prepared.area or ())[:dims]):
            part = part.narrow(dim + 2, prepared.area[dims + dim], size)
        part.copy_(prepared.mult[:, :1])
    return step.frames.images(weight)
