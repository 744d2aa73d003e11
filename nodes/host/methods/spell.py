"""Sparse Repellency as a correction of the host's denoised prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ....formats.layouts import PLAIN, Layout
from ....formats.negation_set import NegationSet
from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.core.references import References
from ....guidance.spell import SpellSettings, repellency, with_unit_pixels
from ..engine.correction import Correction, RunContext, Step
from ..engine.mask import area_of
from ..files.negation_latents import check_images, earlier_references, fitting_references, references_for


@dataclass
class Prepared:
    """References of one run, moved to the sampler's device at the first active step."""

    references: list[References] = field(default_factory=list)
    placed: bool = False


class SpellCorrection(Correction):
    """Keeps predictions out of balls around the images of a negation set, around images made before, and around each other.

    Args:
        negation_set: static references, compared as whole images, or None.
        vae: encodes them; may be None without a set.
        settings: radius and the rest.
        normalized: compare with references of `with_unit_pixels`, as the published baseline does.
        layout: how the set's images get to the size of the run.
        mask: where to look and to act, a MASK of the workflow.
        earlier: (M, C, h, w) latents in VAE space of images made before, references like the set's; the paper's dynamic
            references of earlier batches.
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
        earlier: Tensor | None = None,
    ) -> None:
        self.negation_set, self.vae, self.settings, self.normalized = negation_set, vae, settings, normalized
        self.layout, self.mask, self.earlier = layout, mask, earlier

    @property
    def _is_on(self) -> bool:
        return self.settings.radius > 0 and self.settings.overcompensation > 0

    def begin(self, context: RunContext) -> Prepared:
        check_images(context.latent_shape)
        found: list[References] = []
        if self._is_on and self.negation_set is not None:
            found.append(
                references_for(context.model, self.vae, self.negation_set, context.latent_shape, self.layout)
            )
        if self._is_on and self.earlier is not None:
            found += earlier_references(context.model, self.earlier, context.latent_shape)
        return Prepared([with_unit_pixels(references) for references in found] if self.normalized else found)

    def is_active(self, level: NoiseLevel) -> bool:
        return self._is_on and level in self.settings.window

    def correct(self, step: Step, state: Prepared) -> Change | None:
        if not state.placed:
            state.references = [
                fitting_references(references, step.denoised.device) for references in state.references
            ]
            state.placed = True
        result = repellency(step.denoised.float(), state.references, self.settings, area_of(self.mask, step))
        inside = result.inside > 0
        return Change(result.delta, inside, self.settings.cap, gate=inside.float())
