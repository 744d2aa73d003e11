"""SAFREE's latent re-attention: skip features of the filtered prompt against those of the prompt itself."""

from __future__ import annotations

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
from ..engine.correction import COND, KEY, Correction, RunContext, Step
from ..engine.run import Run

ORIGINAL = "unfiltered"
Block = tuple[str, int]
"""The host's name of a block of the UNet, such as ("output", 3)."""
Place = tuple[Block, int]
"""A block, and the number of one of the conditionings that are in use at a noise level."""


@dataclass
class Features:
    """State of one run: skip features of the model call in progress.

    Attributes:
        scales: factor by the width of a level of the UNet.
        original: the unfiltered prompt's skip features by place, (B, channels, h, w).
        is_recording: True while the unfiltered prompt is evaluated.
        change: change of the first block that changed, for the trace.
        before: that block's features before the change.
    """

    scales: Mapping[int, float]
    original: dict[Place, Tensor] = field(default_factory=dict)
    is_recording: bool = False
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
        with run.charged_to(self), _cleared(features):
            features.is_recording = True
            executor(model, [original], x, timestep, options)
            run.recorder.forwards += len(x)
            features.is_recording = False
            denoised = executor(model, conds, x, timestep, options)
            if features.change is not None and features.before is not None:
                run.note_change(self, features.change, features.before)
        return denoised

    def _patch_skip(self, hidden: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Record the skip features of the unfiltered prompt, or damp those of the filtered one."""
        run: Run | None = options.get(KEY)
        if run is None or run.own_call is None:
            return hidden, skip
        features: Features = run.state_of(self)
        scale = features.scales.get(hidden.shape[1])
        if scale is None:
            return hidden, skip
        entries = run.conditioning(self, ORIGINAL) if features.is_recording else run.guider.conds[COND]
        numbers = {e["uuid"]: n for n, e in enumerate(_entries_at(entries, options["sigmas"]))}
        chunks = list(skip.chunk(len(options["uuids"])))  # one (B, channels, h, w) per conditioning
        for index, (uuid, chunk) in enumerate(zip(options["uuids"], chunks)):
            if uuid not in numbers:
                continue
            place = options["block"], numbers[uuid]
            original = features.original.get(place)
            if features.is_recording:
                features.original[place] = chunk.clone()
            elif original is not None and chunk.shape == original.shape:
                chunks[index] = reattention(chunk, original, scale)
                if features.change is None:
                    features.change = Change(chunks[index] - chunk, torch.ones(len(chunk), dtype=torch.bool))
                    features.before = chunk
        return hidden, torch.cat(chunks)


@contextmanager
def _cleared(features: Features) -> Iterator[None]:
    """Drop the features of the model call after the block."""
    try:
        yield
    finally:
        features.original, features.is_recording, features.change, features.before = {}, False, None, None


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
