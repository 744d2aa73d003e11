"""Safe Denoiser as a correction of the host's denoised prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....formats.layouts import PLAIN, Layout
from ....formats.negation_set import NegationSet
from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.core.references import References
from ....guidance.safe_denoiser.local import Replacement, local_correction
from ....guidance.safe_denoiser.official import normalize_channels
from ....guidance.safe_denoiser.patch_posterior import PatchLibrary, build_library, has_places
from ....guidance.safe_denoiser.similarity import Calibration, calibrate
from ....guidance.safe_denoiser.style import StyledArea, style_correction
from ....guidance.safe_denoiser.style_posterior import StyleLibrary, build_style_library, has_style
from ....guidance.safe_denoiser.whole_image import (
    SafeDenoiserResult,
    SafeDenoiserSettings,
    calibrated_correction,
    likelihood_ratio_correction,
    official_correction,
)
from ..engine.correction import UNCOND, Correction, RunContext, Step
from ..engine.mask import area_of
from ..files.negation_latents import fitting_references, references_for


@dataclass
class Prepared:
    """References of one run. What is computed from them waits for the first active step, when the device is known."""

    references: References | PatchLibrary | StyleLibrary
    calibration: Calibration | None = None
    """Of whole images; a library brings its own."""
    found: Replacement | StyledArea | None = None
    """What the local search has decided in this run, or where it has found the style."""
    placed: bool = False
    """Whether the references are where the sampler works, or stream there."""
    cache: dict[tuple[int, ...], Prepared] = field(default_factory=dict)
    """The patched MODEL's cache, which outlives the run."""


class SafeDenoiserCorrection(Correction):
    """Keeps predictions away from a negation set. The denoise mask of inpainting says where to look and to act.

    The references of the last size sampled and their calibration are kept with the patched MODEL; memory of the sampler's
    device is taken for a run only.

    In calibrated mode a set with masks is looked for locally, at every position; in a set with empty masks, which say that a
    image is fine, the other images stand for a style; one without masks is compared as a whole.
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
        self.negation_set, self.vae, self.settings, self.layout, self.mask = (
            negation_set,
            vae,
            settings,
            layout,
            mask,
        )

    def patch(self, model: ModelPatcher) -> dict[tuple[int, ...], Prepared]:
        """Return an empty cache of the prepared references of the last size sampled."""
        return {}

    def begin(self, context: RunContext) -> Prepared | None:
        if self.settings.strength == 0:
            return None
        context.require_images(self.name)
        # Calibration costs as much as several steps, and queueing again with another prompt or seed asks for the same one.
        cache: dict[tuple[int, ...], Prepared] = context.resources
        known = cache.get(context.latent_shape[1:])
        if known is not None and context.denoise_mask is None:
            return Prepared(known.references, known.calibration, cache=cache)
        references = references_for(
            context.model, self.vae, self.negation_set, context.latent_shape, self.layout
        )
        return Prepared(self._prepare(references), cache=cache)

    def _prepare(self, references: References) -> References | PatchLibrary | StyleLibrary:
        if references.regions is not None and not bool(references.regions.any()):
            raise ValueError(
                "All images of the negation set have empty masks, which say that they are fine. Combine them with unwanted ones."
            )
        if self.settings.mode == "official":
            return references.then(normalize_channels)
        if self.settings.mode != "calibrated" or references.regions is None:
            return references
        if has_places(references.regions):
            return build_library(
                references.rows(slice(None)), references.regions.float(), self.settings.temperature
            )
        if has_style(references.regions):
            return build_style_library(references.rows(slice(None)), references.regions.float())
        return references

    def resume_data(self, state: Prepared | None) -> Replacement | StyledArea | None:
        return None if state is None else state.found

    def resume(self, state: Prepared | None, data: Replacement | StyledArea) -> None:
        if state is not None:
            state.found = data

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def wanted_texts(self, step: Step, state: Prepared) -> dict[str, Tensor]:
        if isinstance(state.found, StyledArea):
            return {UNCOND: state.found.area.flatten(1).amax(1) > 0}
        return {UNCOND: step.every_row} if self.settings.anchor == "unconditional" else {}

    def correct(self, step: Step, state: Prepared) -> Change | None:
        mask = area_of(self.mask, step)
        if not state.placed:
            self._place(state, step.denoised, mask)
        result = self._apply(step, state, mask)
        return Change(result.delta, result.gate > 0, self.settings.cap, gate=result.gate)

    def _place(self, state: Prepared, like: Tensor, mask: Tensor | None) -> None:
        stored, state.placed, device = state.references, True, like.device
        if not isinstance(stored, References):
            state.references = stored.to(device)
        else:
            state.references = fitting_references(stored, device)
            state.calibration = state.calibration or self._calibrate(state.references, device, mask)
        if mask is None or not isinstance(stored, References):
            state.cache.clear()
            state.cache[tuple(like.shape[1:])] = Prepared(stored, state.calibration)

    def _calibrate(
        self, references: References, device: torch.device, mask: Tensor | None
    ) -> Calibration | None:
        if self.settings.mode != "calibrated":
            return None
        return calibrate(references, self.settings.temperature, device, mask)

    def _apply(self, step: Step, state: Prepared, mask: Tensor | None) -> SafeDenoiserResult:
        references, calibration = state.references, state.calibration
        denoised = step.denoised.float()
        if isinstance(references, PatchLibrary):
            before = state.found if isinstance(state.found, Replacement) else Replacement.none(denoised)
            result, decided = local_correction(denoised, references, self.settings, before, step.level, mask)
            if step.is_new:
                state.found = decided
            return result
        # A model without that branch has one prediction only.
        unconditional = step.predictions.get(UNCOND, step.denoised).float()
        if isinstance(references, StyleLibrary):
            area = state.found if isinstance(state.found, StyledArea) else StyledArea.none(denoised)
            result, area = style_correction(denoised, unconditional, references, self.settings, area, mask)
            if step.is_new:
                state.found = area
            return result
        if self.settings.anchor == "unconditional":
            denoised = unconditional
        if calibration is not None:
            return calibrated_correction(denoised, references, calibration, self.settings, mask)
        if self.settings.mode == "official":
            return official_correction(denoised, references, self.settings, mask)
        return likelihood_ratio_correction(
            step.x.float(), denoised, references, step.level, self.settings, mask
        )
