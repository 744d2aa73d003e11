"""Sparse Repellency as a correction of the host's denoised prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...guidance.composition import Change
from ...guidance.layouts import PLAIN, Layout
from ...guidance.negation_set import NegationSet
from ...guidance.noise_level import NoiseLevel
from ...guidance.references import References
from ...guidance.spell import SpellSettings, repellency, unit_pixels
from .areas import area_of
from .negation_latents import check_pictures, fitting_references, references_for
from .runs import Correction, RunContext, Step


@dataclass
class Prepared:
    """References of one run, moved to the sampler's device at the first active step."""

    references: References | None
    placed: bool = False


class SpellCorrection(Correction):
    """Keeps predictions out of balls around the pictures of a negation set, and around each other.

    Args:
        negation_set: static references, compared as whole pictures, or None.
        vae: encodes them; may be None without a set.
        settings: radius and the rest.
        normalized: compare with references of `unit_pixels`, as the published baseline does.
        layout: how the set's pictures get to the size of the run.
        mask: where to look and to act, a MASK of the workflow.
    """

    name = "SPELL"

    def __init__(
        self,
        negation_set: NegationSet | None,
        vae: Any,
        settings: SpellSettings,
        normalized: bool = False,
        layout: Layout = PLAIN,
        mask: Tensor | None = None,
    ) -> None:
        self.negation_set, self.vae, self.settings, self.normalized = negation_set, vae, settings, normalized
        self.layout, self.mask = layout, mask

    @property
    def _is_on(self) -> bool:
        return self.settings.radius > 0 and self.settings.overcompensation > 0

    def begin(self, context: RunContext) -> Prepared:
        check_pictures(context.latent_shape)
        if self.negation_set is None or not self._is_on:
            return Prepared(None)
        references = references_for(context.model, self.vae, self.negation_set, context.latent_shape, self.layout)
        return Prepared(references.then(unit_pixels) if self.normalized else references)

    def is_active(self, level: NoiseLevel) -> bool:
        return self._is_on and level in self.settings.window

    def correct(self, step: Step, state: Prepared) -> Change | None:
        if not state.placed and state.references is not None:
            state.references = fitting_references(state.references, step.denoised.device)
        state.placed = True
        result = repellency(step.denoised.float(), state.references, self.settings, area_of(self.mask, step))
        inside = result.inside > 0
        return Change(result.delta, inside, self.settings.cap, gate=inside.float())
