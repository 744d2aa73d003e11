"""Places of the rows of a model call in the latents of the step.

The model does not always get the whole latents: areas of regional prompts, the host's context windows, and
the tiles of other nodes, one or several in a call. Tiles are found by their content, because every value of
noisy latents is its own, so no other node's way to cut them has to be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..engine.branches import OwnCall
from ..engine.correction import COND, KEY
from ..engine.run import Run

PLACES = f"{KEY}_places"
"""Key of a call's `Places` in the options that the model gets."""


@dataclass(frozen=True, eq=False)
class Places:
    """Rows of one model call of the guider's own.

    Attributes:
        rows: by the host's identifier of a conditioning, the numbers of its rows in the batch, (R,).
        positions: by the same identifier, (R, h, w) where each value of the rows lies in the step's latents
            (B, h, w), flattened; -1 where that is not known. Latents with frames have (R * T, h, w) values,
            in (B, T, h, w).
        is_whole: True if every conditioning's rows are the step's latents, all of them in order.
    """

    rows: Mapping[Any, Tensor]
    positions: Mapping[Any, Tensor]
    is_whole: bool


def locate_rows(model: ModelPatcher) -> None:
    """Add a hook to a MODEL that gives every call of the guider's own its `Places`, once."""
    key = f"{KEY}_places"
    if not model.get_wrappers(WrappersMP.APPLY_MODEL, key):
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, _apply_model)


def _apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: Any = None,
    transformer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    given = dict(transformer_options or {})
    run: Run | None = given.get(KEY)
    call = None if run is None else run.own_call
    given.pop(PLACES, None)
    if call is not None and "uuids" in given:
        given[PLACES] = _places(call, x, c_crossattn, given)
    predicted: Tensor = executor(x, t, c_concat, c_crossattn, control, given, **options)
    return predicted


def _places(call: OwnCall, x: Tensor, context: Tensor | None, options: Mapping[str, Any]) -> Places:
    """Return the places of the rows of x (N, C, [T,] h, w) that belong to the call's conditionings."""
    inside = _positions_of(call)  # (B, [T,] h, w) of the call's latents
    whole = _in_order(call, x, options)
    if whole is None:
        return _found_by_content(call, x, context, inside)
    rows, areas = whole
    positions = {uuid: _frames(_cut(inside, area)) for uuid, area in areas.items()}
    covers = all(_cut(inside, area).shape == inside.shape for area in areas.values())
    return Places(rows, positions, covers and call.window is None)


def _cut(positions: Tensor, area: tuple[int, ...]) -> Tensor:
    """Return an area of positions (B, [T,] h, w), given by its sizes and then its starts."""
    dims = len(area) // 2
    for dim, (size, start) in enumerate(zip(area[:dims], area[dims:]), start=1):
        positions = positions.narrow(dim, start, size)
    return positions


def _frames(values: Tensor) -> Tensor:
    """Return values (B, T, h, w) of latents with frames as (B * T, h, w), others as they are."""
    return values.flatten(0, 1) if values.ndim == 4 else values


def _positions_of(call: OwnCall) -> Tensor:
    """Return where the call's latents lie in the step's, (B, [T,] h, w)."""
    batch, _, *size = call.step_shape
    positions = torch.arange(batch * math.prod(size)).view(batch, 1, *size)
    if call.window is not None:
        retained = getattr(call.handler, "latent_retain_index_list", [])
        positions = call.window.get_tensor(positions, dim=call.window.dim, retain_index_list=retained)
    return positions[:, 0]


def _in_order(
    call: OwnCall, x: Tensor, options: Mapping[str, Any]
) -> tuple[dict[Any, Tensor], dict[Any, tuple[int, ...]]] | None:
    """Return rows and areas (sizes, then starts) of the call's entries, as the host stacks them.

    Returns None if the rows hold something else than the host put there.
    """
    uuids = options["uuids"]
    batch = len(call.x)
    if len(x) != len(uuids) * batch:
        return None
    entries = {entry["uuid"]: entry for entry in _entries(call)}
    rows, areas = {}, {}
    for number, uuid in enumerate(uuids):
        if uuid not in entries:
            continue
        prepared = comfy.samplers.get_area_and_mult(entries[uuid], call.x, options["sigmas"])
        part = slice(number * batch, (number + 1) * batch)
        if prepared is None or not _equal(x[part], prepared.input_x):
            return None
        rows[uuid] = torch.arange(part.start, part.stop)
        dims = call.x.shape[2:]
        areas[uuid] = tuple(prepared.area or (*dims, *[0] * len(dims)))
    return rows, areas


def _found_by_content(call: OwnCall, x: Tensor, context: Tensor | None, inside: Tensor) -> Places:
    """Return the places of tiles, by the values of their latents and of their text embeddings."""
    frames = x.shape[2] if x.ndim == 5 else 1
    local, found = positions_in(_images(x.cpu()), _images(call.x.cpu()))
    samples = found[::frames] // (call.x.shape[2] if x.ndim == 5 else 1)
    positions = torch.where(local >= 0, inside.flatten()[local.clamp_min(0)], -1)  # (N * T, h, w)
    positions = positions.unflatten(0, (len(x), frames))
    rows: dict[Any, Tensor] = {}
    left = torch.ones(len(x), dtype=torch.bool)
    for entry in _entries(call):
        mine = left & _rows_with(entry, context, samples)
        if bool(mine.any()):
            rows[entry["uuid"]] = mine.nonzero()[:, 0]
            left &= ~mine
    return Places(rows, {uuid: _frames(positions[of_uuid]) for uuid, of_uuid in rows.items()}, False)


def _images(latents: Tensor) -> Tensor:
    """Return latents (B, C, T, h, w) as images (B * T, C, h, w), others as they are."""
    return latents.movedim(2, 1).flatten(0, 1) if latents.ndim == 5 else latents


def positions_in(tiles: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the values of tiles come from.

    Args:
        tiles: (N, C, h, w), in any order and cut, moved, mirrored or spread in any way.
        whole: (B, C, H, W) noisy latents.

    Returns:
        (N, h, w) positions in (B, H, W), flattened, -1 where nothing is equal; and (N,) the sample of every
        tile. Equal samples of a batch are told apart by their order among the tiles.
    """
    channels = whole.shape[1]
    size = whole.shape[-2] * whole.shape[-1]
    # A sum of all channels with irregular weights is different for different values.
    weights = torch.linspace(1, 2, channels, dtype=torch.float64).exp()
    wanted = tiles.double().movedim(1, -1).reshape(-1, channels)  # (N * h * w, C)
    candidates = []
    for sample in whole.double():
        known = sample.flatten(1).T  # (H * W, C)
        keys, order = (known @ weights).sort()
        nearest = torch.searchsorted(keys, wanted @ weights).clamp_max(size - 1)
        # Rounding may put the key on either side of its equal.
        found = torch.full((len(wanted),), -1)
        for offset in (0, -1, 1):
            index = order[(nearest + offset).clamp(0, size - 1)]
            found = torch.where((known[index] == wanted).all(1), index, found)
        candidates.append(found.view(len(tiles), -1))
    stacked = torch.stack(candidates)  # (B, N, h * w)
    shares = (stacked >= 0).float().mean(-1)  # (B, N)
    samples = _told_apart(shares, stacked)
    chosen = stacked[samples, torch.arange(len(tiles))]
    positions = torch.where(chosen >= 0, chosen + (samples * size)[:, None], chosen)
    return positions.view(len(tiles), *tiles.shape[-2:]), samples


def _told_apart(shares: Tensor, candidates: Tensor) -> Tensor:
    """Return the sample (N,) that each tile is taken from, given the shares (B, N) that are found in each."""
    used: dict[tuple[int, ...], int] = {}
    samples = []
    for tile in range(shares.shape[1]):
        best = [b for b in range(len(shares)) if shares[b, tile] == shares[:, tile].max()]
        place = (*best, int(candidates[best[0], tile, 0]))
        number = used[place] = used.get(place, -1) + 1
        samples.append(best[number % len(best)])
    return torch.tensor(samples)


def _rows_with(entry: Mapping[str, Any], context: Tensor | None, samples: Tensor) -> Tensor:
    """Return (N,) bool: rows whose text embedding is that of a conditioning for their sample."""
    prepared = entry["model_conds"].get("c_crossattn")
    if prepared is None or context is None:
        return torch.zeros(len(samples), dtype=torch.bool)
    own = prepared.cond.to(context)
    repeats, rest = divmod(context.shape[1], own.shape[1])
    if rest:
        return torch.zeros(len(samples), dtype=torch.bool)
    of_row = own[samples.to(own.device) % len(own)].repeat(1, repeats, 1)
    return (of_row == context).flatten(1).all(1).cpu()


def _entries(call: OwnCall) -> list[dict[str, Any]]:
    """Return the call's conditionings, those of the positive branch first."""
    names = sorted(call.conds, key=lambda name: name != COND)
    return [entry for name in names for entry in call.conds[name]]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
