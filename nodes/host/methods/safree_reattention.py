"""SAFREE's latent re-attention: skip features of the filtered prompt against those of the prompt itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@dataclass
class Features:
    """Skip features of one model call: first the original prompt's are kept, then the filtered one's are compared with them."""

    original: dict[Block, Tensor] = field(default_factory=dict)
    listening: bool = False
    change: Change | None = None
    """Of the first block that changed, for the record."""
    before: Tensor | None = None


class ReattentionCorrection(Correction):
    """Damps low frequencies that the filtered prompt has more of than the prompt itself.

    Args:
        unfiltered: CONDITIONING of the prompt before the filter.
        deep, shallow: factors in the deepest and the second deepest level of the decoder; 1 leaves a level alone.
    """

    name = "SAFREE re-attention"

    def __init__(self, unfiltered: list[Any], deep: float, shallow: float) -> None:
        self.texts = {ORIGINAL: unfiltered}
        self.deep, self.shallow = deep, shallow
        self._scales: dict[int, float] = {}

    def patch(self, model: ModelPatcher) -> None:
        config = model.model.model_config.unet_config
        if "channel_mult" not in config:
            raise ValueError(
                "Latent re-attention works in the decoder of a UNet, which this model does not have. Remove the node."
            )
        widths = sorted(
            {config["model_channels"] * factor for factor in config["channel_mult"]}, reverse=True
        )
        self._scales = {width: scale for width, scale in zip(widths, (self.deep, self.shallow)) if scale != 1}
        if self._scales:
            model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, f"{KEY}_reattention", self._evaluate)
            model.set_model_output_block_patch(self._skip)

    def begin(self, context: RunContext) -> Features:
        return Features()

    def is_active(self, level: NoiseLevel) -> bool:
        return bool(self._scales)

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
        run: Run | None = options["transformer_options"].get(KEY)
        positive = None if run is None or not run.is_guiders_forward else run.guider.conds[COND]
        if run is None or positive is None or not any(cond is positive for cond in conds):
            return executor(model, conds, x, timestep, options)
        original = run.conditioning(self, ORIGINAL)
        if _same_text(_active(positive, timestep), original):
            return executor(model, conds, x, timestep, options)
        features: Features = run.state_of(self)
        with run.charged_to(self), _cleared(features):
            features.listening = True
            executor(model, [original], x, timestep, options)
            run.recorder.forwards += len(x)
            features.listening = False
            denoised = executor(model, conds, x, timestep, options)
            if features.change is not None and features.before is not None:
                run.note_change(self, features.change, features.before)
        return denoised

    def _skip(self, hidden: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        run: Run | None = options.get(KEY)
        scale = self._scales.get(hidden.shape[1])
        if run is None or scale is None or not run.is_guiders_forward:
            return hidden, skip
        features: Features = run.state_of(self)
        if features.listening:
            features.original[options["block"]] = skip.clone()
            return hidden, skip
        original = features.original.get(options["block"])
        if original is None:
            return hidden, skip
        positive = {entry["uuid"] for entry in run.guider.conds[COND]}
        chunks = list(skip.chunk(len(options["uuids"])))
        for index, (uuid, chunk) in enumerate(zip(options["uuids"], chunks)):
            if uuid in positive and chunk.shape == original.shape:
                chunks[index] = reattention(chunk, original, scale)
                if features.change is None:
                    features.change = Change(chunks[index] - chunk, torch.ones(len(chunk), dtype=torch.bool))
                    features.before = chunk
        return hidden, torch.cat(chunks)


@contextmanager
def _cleared(features: Features) -> Iterator[None]:
    try:
        yield
    finally:
        features.original, features.listening, features.change, features.before = {}, False, None, None


def _active(entries: list[dict[str, Any]], timestep: Tensor) -> list[dict[str, Any]]:
    """The entries of a prepared conditioning that the host uses at a noise level."""
    sigma = float(timestep[0])
    return [
        e for e in entries if e.get("timestep_end", 0.0) <= sigma <= e.get("timestep_start", float("inf"))
    ]


def _same_text(entries: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    a, b = ([entry["model_conds"]["c_crossattn"].cond for entry in of] for of in (entries, others))
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))
