"""Safe Denoiser as a correction of the host's denoised prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...guidance.composition import Change
from ...guidance.local_safe_denoiser import Patches, cut_patches, local_correction, typical_patch_similarity
from ...guidance.negation_set import NegationSet
from ...guidance.noise_level import NoiseLevel
from ...guidance.references import References
from ...guidance.safe_denoiser import (
    SafeDenoiserResult,
    SafeDenoiserSettings,
    calibrated_correction,
    likelihood_ratio_correction,
    typical_similarity,
)
from .negation_latents import references_for
from .runs import Correction, RunContext, Step

LATCH = 0.25
"""A local search's gate that was this far open stays open for the rest of the run."""


@dataclass
class Prepared:
    """References of one run. What is computed from them waits for the first active step, when the device is known."""

    references: Tensor | Patches
    typical: Tensor | None = None
    opened: Tensor | None = None
    """(B,) bool, samples whose gate the local search has opened in this run."""


class SafeDenoiserCorrection(Correction):
    """Keeps predictions away from a negation set. The denoise mask of inpainting says where to look and to act.

    The references of the last size sampled, calibrated and on the sampler's device, are kept with the object.

    In calibrated mode a set with masks is looked for locally, at every position; one without is compared as a whole.
    """

    name = "Safe Denoiser"

    def __init__(self, negation_set: NegationSet, vae: Any, settings: SafeDenoiserSettings) -> None:
        self.negation_set, self.vae, self.settings = negation_set, vae, settings
        self._calibrated: dict[tuple[int, ...], Prepared] = {}

    def begin(self, context: RunContext) -> Prepared | None:
        if self.settings.strength == 0:
            return None
        # Calibration costs as much as several steps, and queueing again with another prompt or seed asks for the same one.
        known = self._calibrated.get(context.latent_shape[1:])
        if known is not None and context.denoise_mask is None:
            return Prepared(known.references, known.typical)
        return Prepared(self._prepare(references_for(context.model, self.vae, self.negation_set, context.latent_shape)))

    def _prepare(self, references: References) -> Tensor | Patches:
        latents = references.latents.float()
        if references.regions is None or self.settings.mode != "calibrated":
            return latents
        return cut_patches(latents, references.regions.float())

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def correct(self, step: Step, state: Prepared) -> Change | None:
        mask = None if step.denoise_mask is None else step.denoise_mask[:, :1].float()
        if state.typical is None:
            state.references = state.references.to(step.denoised.device)
            state.typical = self._calibrate(state.references, mask)
            if mask is None:
                self._calibrated = {tuple(step.denoised.shape[1:]): Prepared(state.references, state.typical)}
        result = self._apply(step, state, state.typical, mask)
        return Change(result.delta, result.gate > 0, self.settings.cap, gate=result.gate)

    def _calibrate(self, references: Tensor | Patches, mask: Tensor | None) -> Tensor:
        if isinstance(references, Patches):
            return typical_patch_similarity(references, self.settings.temperature)
        if self.settings.mode != "calibrated":
            return torch.tensor(0.0)
        # One calibration for the batch: its samples share their inpainting mask in all but contrived workflows.
        return typical_similarity(references, self.settings.temperature, None if mask is None else mask[:1])

    def _apply(self, step: Step, state: Prepared, typical: Tensor, mask: Tensor | None) -> SafeDenoiserResult:
        denoised, references = step.denoised.float(), state.references
        if isinstance(references, Patches):
            if state.opened is None:
                state.opened = torch.zeros(len(denoised), dtype=torch.bool, device=denoised.device)
            result = local_correction(denoised, references, typical, self.settings, state.opened, mask)
            if step.is_new:
                state.opened = state.opened | (result.gate >= LATCH)
            return result
        if self.settings.mode == "calibrated":
            return calibrated_correction(denoised, references, typical, self.settings, mask)
        return likelihood_ratio_correction(step.x.float(), denoised, references, step.level, self.settings, mask)
