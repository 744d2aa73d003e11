"""Safe Denoiser as a correction of the host's denoised prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ....formats.layouts import PLAIN, Layout
from ....formats.negation_set import NegationSet
from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.safe_denoiser.choice import choose_comparison
from ....guidance.safe_denoiser.interface import Comparison, Predictions
from ....guidance.safe_denoiser.settings import SafeDenoiserSettings
from ..engine.correction import UNCOND, Correction, RunContext, Step
from ..engine.mask import area_of
from ..files.negation_latents import fitting_references, references_for


@dataclass
class SafeDenoiserRun:
    """State of one run: the comparison, and whether it is placed on the sampler's device yet."""

    comparison: Comparison
    is_placed: bool = False


class SafeDenoiserCorrection(Correction):
    """Keeps predictions away from a negation set.

    The denoise mask of inpainting limits where it compares and acts.

    The comparison of the last size sampled is kept for further runs; memory of the sampler's device is taken
    for a run only.

    Args:
        negation_set: the unwanted images, with masks or without.
        vae: encodes them.
        settings: mode, strength and the rest.
        layout: how the set's images are brought to the size of the run.
        mask: where to compare and to act, a MASK of the workflow, or None for everywhere.
    """

    name = "Safe Denoiser"

    def __init__(
        self,
        negation_set: NegationSet,
        vae: Any,
        settings: SafeDenoiserSettings,
        layout: Layout = PLAIN,
        mask: Tensor | None = None,
    ) -> None:
        self.negation_set, self.vae, self.settings = negation_set, vae, settings
        self.layout, self.mask = layout, mask
        self._kept: dict[tuple[int, ...], Comparison] = {}

    def begin(self, context: RunContext) -> SafeDenoiserRun | None:
        if self.settings.strength == 0:
            return None
        # The statistics of a set cost as much as several steps, and queueing again with another prompt or
        # seed needs the same.
        kept = self._kept.get(context.latent_shape[1:])
        if kept is not None:
            return SafeDenoiserRun(kept.for_another_run())
        references = references_for(
            context.model, self.vae, self.negation_set, context.latent_shape, self.layout
        )
        return SafeDenoiserRun(choose_comparison(references, self.settings))

    def carried(self, state: SafeDenoiserRun | None) -> Any:
        return None if state is None else state.comparison.carried()

    def resume(self, state: SafeDenoiserRun | None, carried: Any) -> None:
        if state is not None:
            state.comparison.resume(carried)

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def wanted_texts(self, step: Step, state: SafeDenoiserRun) -> dict[str, Tensor]:
        rows = state.comparison.unconditional_rows(step.every_row)
        return {} if rows is None else {UNCOND: rows}

    def correct(self, step: Step, state: SafeDenoiserRun) -> Change | None:
        mask = area_of(self.mask, step)
        if not state.is_placed:
            self._place(state, step.denoised, mask)
        predictions = Predictions(
            x=step.x.float(),
            denoised=step.denoised.float(),
            # A model without that branch has one prediction only.
            unconditional=step.predictions.get(UNCOND, step.denoised).float(),
            level=step.level,
            mask=mask,
            is_new=step.is_new,
        )
        result = state.comparison.correct(predictions)
        return Change(result.delta, result.gate > 0, self.settings.cap, gate=result.gate)

    def _place(self, state: SafeDenoiserRun, like: Tensor, mask: Tensor | None) -> None:
        state.comparison.place(like.device, fitting_references, mask)
        state.is_placed = True
        self._kept = {tuple(like.shape[1:]): state.comparison.for_another_run()}
