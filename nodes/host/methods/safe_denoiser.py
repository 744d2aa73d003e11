"""Safe Denoiser as a correction of the host's denoised prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....formats.layouts import PLAIN, Layout
from ....formats.negation_set import NegationSet
from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.safe_denoiser.choice import choose_comparison
from ....guidance.safe_denoiser.interface import Comparison, Predictions
from ....guidance.safe_denoiser.mismatches import mismatches
from ....guidance.safe_denoiser.settings import SafeDenoiserSettings
from ..engine.correction import UNCOND, Correction, RunContext, Step
from ..engine.mask import area_of
from ..files.negation_latents import fitting_references, references_for


class LastComparison:
    """Cache of a patched MODEL: the comparison for the last sampled size.

    Computing a comparison costs as much as several steps. Another prompt or seed can use the same one.
    """

    def __init__(self) -> None:
        self._size: tuple[int, ...] = ()
        self._comparison: Comparison | None = None
        self.remarks: tuple[str, ...] = ()

    def get(self, image_shape: tuple[int, ...]) -> Comparison | None:
        """Return the comparison for images (F, C, h, w) of this size, ready for another run.

        Return None if the kept comparison is for another size.
        """
        if self._comparison is None or self._size != image_shape[1:]:
            return None
        return self._comparison.for_another_run()

    def keep(self, image_shape: tuple[int, ...], comparison: Comparison, remarks: tuple[str, ...]) -> None:
        """Replace the comparison that is kept, without the state of its run, and the remarks on it."""
        self._size, self._comparison = image_shape[1:], comparison.for_another_run()
        self.remarks = remarks


@dataclass
class SafeDenoiserState:
    """State of one run.

    Attributes:
        comparison: how predictions are compared with the negation set, with the state that this run advances.
        resources: where the comparison is kept for further runs.
        remarks: sentences on settings that do not fit the set at this size.
        on_device: True once the set is on the sampler's device, from the first active step on.
    """

    comparison: Comparison
    resources: LastComparison
    remarks: tuple[str, ...] = ()
    on_device: bool = False


class SafeDenoiserCorrection(Correction):
    """Guidance away from the images of a negation set. An inpainting mask limits where it compares and acts.

    Args:
        negation_set: the unwanted images, with masks or without.
        vae: encodes them.
        settings: mode, strength and the rest.
        layout: how the set's images are brought to the size of the run.
        mask: MASK of the workflow, where to compare and to act; None for everywhere.
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

    def patch(self, model: ModelPatcher) -> LastComparison:
        return LastComparison()

    def begin(self, context: RunContext) -> SafeDenoiserState | None:
        if self.settings.strength == 0:
            return None
        resources: LastComparison = context.resources
        comparison = resources.get(context.image_shape)
        remarks = resources.remarks
        if comparison is None:
            references = references_for(
                context.model, self.vae, self.negation_set, context.frames, self.layout
            )
            comparison = choose_comparison(references, self.settings)
            remarks = tuple(mismatches(references.regions, self.settings))
        return SafeDenoiserState(comparison, resources, remarks)

    def remarks(self, state: SafeDenoiserState | None) -> Sequence[str]:
        return () if state is None else state.remarks

    def resume_data(self, state: SafeDenoiserState | None) -> Any:
        return None if state is None else state.comparison.resume_data()

    def resume(self, state: SafeDenoiserState | None, data: Any) -> None:
        if state is not None:
            state.comparison.resume(data)

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def wanted_texts(self, step: Step, state: SafeDenoiserState) -> dict[str, Tensor]:
        rows = state.comparison.unconditional_rows(step.every_row)
        return {} if rows is None else {UNCOND: rows}

    def correct(self, step: Step, state: SafeDenoiserState) -> Change | None:
        mask = area_of(self.mask, step)
        if not state.on_device:
            state.comparison.place(step.denoised.device, fitting_references, mask)
            state.resources.keep(tuple(step.denoised.shape), state.comparison, state.remarks)
            state.on_device = True
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
