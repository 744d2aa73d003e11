"""Safe Denoiser as a correction of the host's denoised prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...guidance.composition import Change
from ...guidance.negation_set import NegationSet
from ...guidance.noise_level import NoiseLevel
from ...guidance.safe_denoiser import (
    References,
    SafeDenoiserResult,
    SafeDenoiserSettings,
    calibrated_correction,
    likelihood_ratio_correction,
    typical_similarity,
)
from .negation_latents import references_for
from .runs import Correction, RunContext, Step


@dataclass
class Prepared:
    """References of one run; calibrated and moved to the sampler's device at the first active step."""

    references: References
    typical: Tensor | None = None


class SafeDenoiserCorrection(Correction):
    """Keeps predictions away from a negation set. The denoise mask of inpainting says where to look and to act."""

    def __init__(self, negation_set: NegationSet, vae: Any, settings: SafeDenoiserSettings) -> None:
        self.negation_set, self.vae, self.settings = negation_set, vae, settings

    def begin(self, context: RunContext) -> Prepared | None:
        if self.settings.strength == 0:
            return None
        return Prepared(references_for(context.model, self.vae, self.negation_set, context.latent_shape))

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def correct(self, step: Step, state: Prepared) -> Change | None:
        mask = None if step.denoise_mask is None else step.denoise_mask[:, :1].float()
        if state.typical is None:
            state.references = state.references.to(step.denoised.device)
            # A calibration per sample would cost as many; masks of one batch rarely differ.
            state.typical = typical_similarity(state.references, self.settings.temperature, None if mask is None else mask[:1])
        result = self._apply(step, state.references, state.typical, mask)
        return Change(result.delta, result.gate > 0, self.settings.cap)

    def _apply(self, step: Step, references: References, typical: Tensor, mask: Tensor | None) -> SafeDenoiserResult:
        if self.settings.mode == "calibrated":
            return calibrated_correction(step.denoised.float(), references, typical, self.settings, mask)
        return likelihood_ratio_correction(step.x.float(), step.denoised.float(), references, step.level, self.settings, mask)
