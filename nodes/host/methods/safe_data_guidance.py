"""Safe Data Guidance as a correction: it moves the prediction against the gradient of the unsafe score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....guidance.core.composition import Change, per_sample
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.safe_data_guidance import (
    SafeDataGuidanceSettings,
    data_guidance,
    latent_gradient_from_prediction,
)
from ....guidance.safety_functions.interface import SafetyFunction
from ..autograd.decoders import DecoderName
from ..autograd.gradients import in_parts, latent_gradient
from ..engine.correction import Evaluation, RunContext, Step
from .detector_correction import DetectorCorrection, Sight, kept_latent, largest_entry, require_images


@dataclass
class DataGuidanceState:
    """What inpainting keeps, and between the two parts of a step the host's side of the evaluation."""

    kept: Tensor | None
    evaluation: Evaluation | None = None


class SafeDataGuidanceCorrection(DetectorCorrection):
    """Moves the predictions of images that the safety function objects to."""

    name = "SDG"

    def __init__(
        self,
        vae: Any,
        function: SafetyFunction,
        settings: SafeDataGuidanceSettings,
        decoder: DecoderName = "vae",
        checkpointed: bool = False,
    ) -> None:
        super().__init__(vae, function, settings.tau, decoder, checkpointed)
        self.settings = settings

    def begin(self, context: RunContext) -> DataGuidanceState:
        require_images(context, self.name)
        return DataGuidanceState(kept_latent(context))

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def steer(self, step: Step, state: DataGuidanceState, evaluation: Evaluation) -> None:
        # The gradient belongs to the prediction after all steering, so it waits for `correct`.
        state.evaluation = evaluation

    def correct(self, step: Step, state: DataGuidanceState) -> Change | None:
        evaluation, state.evaluation = state.evaluation, None
        assert evaluation is not None
        sight = self.look(step, state.kept)
        rows = sight.rows
        if not len(rows):
            return None
        (of_rows,) = in_parts(
            rows,
            lambda some, short: [self._gradient(step, sight, evaluation, some, short or self.checkpointed)],
        )
        assert of_rows is not None
        gradient = torch.zeros_like(step.denoised, dtype=torch.float32).index_copy(
            0, rows, of_rows.to(step.denoised.device)
        )
        delta, usable = data_guidance(step.denoised, gradient, step.level, self.settings)
        return Change(delta, sight.hit & usable)

    def _gradient(
        self, step: Step, sight: Sight, evaluation: Evaluation, rows: Tensor, checkpointed: bool
    ) -> Tensor:
        """Gradient of the unsafe score with respect to what the model was given, or in place of it to what it predicted."""
        wanted = self.score_gradient(step, sight, rows)
        if self.settings.cheap:
            return latent_gradient_from_prediction(wanted, step.level)
        size = largest_entry(wanted)
        return latent_gradient(
            evaluation, wanted / per_sample(size, wanted), rows, checkpointed
        ).float() * per_sample(size, wanted)
