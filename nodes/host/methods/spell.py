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
from ..files.negation_latents import earlier_references, fitting_references, references_for


@dataclass
class SpellState:
    """References of one run.

    Attributes:
        references: the references of the negation set and of earlier images.
        on_device: True once they are on the sampler's device, from the first active step on.
    """

    references: list[References] = field(default_factory=list)
    on_device: bool = False


class SpellCorrection(Correction):
    """Repellency out of balls around a negation set's images, earlier images, and images of the same batch.

    Args:
        negation_set: static references, compared as whole images, or None.
        vae: encodes them; may be None without a set.
        settings: radius and the rest.
        normalized: compare with references of `with_unit_pixels`, as the published baseline does.
        layout: how the set's images are brought to the size of the run.
        mask: MASK of the workflow, where to compare and to act; None for everywhere.
        earlier: (M, C, h, w) latents in VAE space of earlier images, used like the set's references; they are
            the paper's dynamic references of earlier batches.
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

    def begin(self, context: RunContext) -> SpellState:
        if not self._is_on:
            return SpellState()
        found: list[References] = []
        if self.negation_set is not None:
            found.append(
                references_for(context.model, self.vae, self.negation_set, context.frames, self.layout)
            )
        if self.earlier is not None:
            found += earlier_references(context.model, self.earlier, context.frames)
        if self.normalized:
            found = [with_unit_pixels(references) for references in found]
        return SpellState(found)

    def is_active(self, level: NoiseLevel) -> bool:
        return self._is_on and level in self.settings.window

    def correct(self, step: Step, state: SpellState) -> Change | None:
        if not state.on_device:
            device = step.denoised.device
            state.references = [fitting_references(references, device) for references in state.references]
            state.on_device = True
        result = repellency(step.denoised.float(), state.references, self.settings, area_of(self.mask, step))
        inside = result.inside > 0  # (B,)
        return Change(result.delta, inside, self.settings.cap, gate=inside.float())
