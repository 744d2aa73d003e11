"""SAFREE's latent re-attention: skip features of the filtered prompt against those of the prompt itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.safree import reattention
from ..attention.placement import PLACES, Places, locate_rows
from ..engine.correction import COND, KEY, Correction, RunContext, Step
from ..engine.run import Run

ORIGINAL = "unfiltered"
Block = tuple[str, int]
"""The host's name of a block of the UNet, such as ("output", 3)."""
Place = tuple[Block, int, int, int]
"""A block, the number of a conditioning in use at a noise level, and two corners of a part of the latent."""


@dataclass
class Features:
    """State of one run: skip features of the model call in progress.

    Attributes:
        scales: factor by the width of a level of the UNet.
        original: the unfiltered prompt's skip features by place, (channels, h, w).
        change: change of the first block that changed, for the trace.
        before: that block's features before the change.
    """

    scales: Mapping[int, float]
    original: dict[Place, Tensor] = field(default_factory=dict)
    change: Change | None = None
    before: Tensor | None = None


class ReattentionCorrection(Correction):
    """Damping of low frequencies that the filtered prompt has more of than the prompt itself.

    Args:
        unfiltered: CONDITIONING of the prompt before the filter.
        deep: factor in the deepest level of the decoder; 1 leaves the level unchanged.
        shallow: factor in the second deepest level; 1 leaves the level unchanged.
    """

    name = "SAFREE re-attention"
    compared_with = COND

    def __init__(self, unfiltered: list[Any], deep: float, shallow: float) -> None:
        self.texts = {ORIGINAL: unfiltered}
        self.deep, self.shallow = deep, shallow

    def patch(self, model: ModelPatcher) -> dict[int, float]:
        """Add the hooks, and return the factor of each level of this UNet by the level's width."""
        config = model.model.model_config.unet_config
        if "channel_mult" not in config:
            raise ValueError(
                "Latent re-attention works in the decoder of a UNet, which this model does not have. "
                "Remove the node."
            )
        widths = {config["model_channels"] * factor for factor in config["channel_mult"]}
        by_depth = zip(sorted(widths, reverse=True), (self.deep, self.shallow))
        scales = {width: scale for width, scale in by_depth if scale != 1}
        if scales:
            model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, f"{KEY}_reattention", self._evaluate)
            locate_rows(model)
            model.set_model_output_block_patch(self._patch_skip)
        return scales

    def begin(self, context: RunContext) -> Features:
        return Features(context.resources)

    def is_active(self, level: NoiseLevel) -> bool:
        return self.deep != 1 or self.shallow != 1

    def correct(self, step: Step, state: Features) -> None:
        return None

    def _evaluate(
        self,
        executor: Callable[..., Any],
        model: Any,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
    ) -> Any:
        """Evaluate the unfiltered prompt before the guider's forward, if it differs from the filtered one."""
        run: Run | None = options["transformer_options"].get(KEY)
        own = None if run is None else run.own_call
        if run is None or own is None or COND not in own.conds:
            return executor(model, conds, x, timestep, options)
        positive = own.conds[COND]
        original = run.conditioning(self, ORIGINAL)
        if _same_text(_entries_at(positive, timestep), _entries_at(original, timestep)):
            return executor(model, conds, x, timestep, options)
        features: Features = run.state_of(self)
        if own.window is not None:
            whole = torch.empty(own.step_shape, device="meta")
            original = own.handler.get_resized_cond(original, whole, own.window)
        with run.charged_to(self), _cleared(features):
            with run.evaluating_text(ORIGINAL, original):
                executor(model, [original], x, timestep, options)
            run.recorder.forwards += len(x)
            denoised = executor(model, conds, x, timestep, options)
            if features.change is not None and features.before is not None:
                run.note_change(self, features.change, features.before)
        return denoised

    def _patch_skip(self, hidden: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Record the skip features of the unfiltered prompt, or damp those of the filtered one."""
        run: Run | None = options.get(KEY)
        own = None if run is None else run.own_call
        places: Places | None = options.get(PLACES)
        if run is None or own is None or places is None:
            return hidden, skip
        features: Features = run.state_of(self)
        scale = features.scales.get(hidden.shape[1])
        if scale is None:
            return hidden, skip
        is_recording = ORIGINAL in own.conds
        entries = _entries_at(own.conds.get(ORIGINAL) or own.conds.get(COND) or [], options["sigmas"])
        for number, entry in enumerate(entries):
            rows = places.rows.get(entry["uuid"])
            if rows is None:
                continue
            where = places.positions[entry["uuid"]]
            # The corners tell tiles and windows apart, which the same evaluations cut in the same way.
            keys = [(options["block"], number, int(at[0, 0]), int(at[-1, -1])) for at in where]
            if is_recording:
                features.original.update((key, skip[row].clone()) for key, row in zip(keys, rows.tolist()))
            else:
                damped = _damped(skip, rows.to(skip.device), keys, scale, features)
                if features.change is None and damped is not skip:
                    samples = where[:, 0, 0].clamp_min(0) // math.prod(own.step_shape[2:])
                    _remember_change(features, damped[rows], skip[rows], samples, own.step_shape[0])
                skip = damped
        return hidden, skip


def _damped(skip: Tensor, rows: Tensor, keys: list[Place], scale: float, features: Features) -> Tensor:
    """Return skip features whose rows are damped against those of the unfiltered prompt at the same place."""
    originals = [features.original.get(key) for key in keys]
    known = [original for original in originals if original is not None]
    chosen = rows[torch.tensor([original is not None for original in originals], device=rows.device)]
    if not known:
        return skip
    after = reattention(skip[chosen], torch.stack(known), scale)
    return skip.index_copy(0, chosen, after)


def _remember_change(features: Features, after: Tensor, before: Tensor, samples: Tensor, batch: int) -> None:
    """Remember what changed in the rows (R, channels, h, w) of some samples (R,), for the trace."""
    delta = before.new_zeros(batch, *before.shape[1:])
    features.before = torch.ones_like(delta)
    active = torch.zeros(batch, dtype=torch.bool)
    on_device = samples.to(delta.device)
    delta[on_device], features.before[on_device], active[samples] = after - before, before, True
    features.change = Change(delta, active)


@contextmanager
def _cleared(features: Features) -> Iterator[None]:
    """Drop the features of the model call after the block."""
    try:
        yield
    finally:
        features.original, features.change, features.before = {}, None, None


def _entries_at(entries: list[dict[str, Any]], timestep: Tensor) -> list[dict[str, Any]]:
    """Return the entries of a prepared conditioning that the host uses at a noise level."""
    sigma = float(timestep[0])
    return [
        e for e in entries if e.get("timestep_end", 0.0) <= sigma <= e.get("timestep_start", float("inf"))
    ]


def _same_text(entries: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Return True if two prepared conditionings have equal embeddings."""
    a = [entry["model_conds"]["c_crossattn"].cond for entry in entries]
    b = [entry["model_conds"]["c_crossattn"].cond for entry in others]
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))
