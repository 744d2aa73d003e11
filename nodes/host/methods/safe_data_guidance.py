"""Safe Data Guidance as a correction: it moves the prediction against the gradient of the unsafe score."""

from __future__ import annotations

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
from ..engine.correction import Step
from .detector_correction import DetectorCorrection, DetectorState, Verdict, largest_entry


class SafeDataGuidanceCorrection(DetectorCorrection):
    """Data-space guidance of the images that the safety function finds unsafe.

    The gradient belongs to the prediction after all steering, so everything happens in `correct`.
    """

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

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def correct(self, step: Step, state: DetectorState) -> Change | None:
        verdict = self.assess(step, state)
        indices = verdict.indices
        if not len(indices):
            return None

        def gradient_of(some: Tensor, is_short_of_memory: bool) -> list[Tensor | None]:
            return [self._gradient(step, state, verdict, some, is_short_of_memory or self.checkpointed)]

        (found,) = in_parts(indices, gradient_of)
        assert found is not None
        gradient = torch.zeros_like(step.denoised, dtype=torch.float32)
        gradient = gradient.index_copy(0, indices, found.to(step.denoised.device))
        delta, usable = data_guidance(step.denoised, gradient, step.level, self.settings)
        return Change(delta, verdict.is_unsafe & usable)

    def _gradient(
        self, step: Step, state: DetectorState, verdict: Verdict, indices: Tensor, checkpointed: bool
    ) -> Tensor:
        """Return the gradient of the unsafe score with respect to the noisy latent, (R, C, h, w).

        The cheap variant approximates it from the gradient with respect to the prediction.
        """
        wanted = self.score_gradient(step, state, verdict, indices)
        if self.settings.cheap:
            return latent_gradient_from_prediction(wanted, step.level)
        size = largest_entry(wanted)
        scaled = wanted / per_sample(size, wanted)
        return latent_gradient(step, scaled, indices, checkpointed).float() * per_sample(size, wanted)
