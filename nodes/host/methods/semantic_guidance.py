"""Semantic Guidance as a correction of the host's denoised prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.semantic_guidance import SemanticGuidanceSettings, denoised_change, semantic_guidance
from ..engine.correction import UNCOND, Step
from .momentum import Momentum, MomentumCorrection


class SemanticGuidanceCorrection(MomentumCorrection):
    """Guidance along the directions of concepts. Needs the guider's negative branch."""

    name = "Semantic Guidance"

    def __init__(self, concept_texts: Sequence[list[Any]], settings: SemanticGuidanceSettings) -> None:
        self._names = [f"concept {index}" for index in range(len(concept_texts))]
        self.texts = dict(zip(self._names, concept_texts))
        self.settings = settings

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.acts(level)

    def wanted_texts(self, step: Step, state: Momentum) -> Mapping[str, Tensor]:
        names = [self._names[i] for i in self.settings.needed(step.level)]
        return dict.fromkeys((*names, UNCOND), step.every_row)

    def correct(self, step: Step, state: Momentum) -> Change | None:
        if UNCOND not in step.predictions:
            return None
        uncond = step.predictions[UNCOND].float()
        predictions = [step.predictions.get(name) for name in self._names]
        momentum = state.or_zeros(uncond)
        guidance, momentum = semantic_guidance(
            predictions, uncond, step.sigma, step.level, momentum, self.settings
        )
        if step.is_new:
            state.value = momentum
        if guidance is None:
            return None
        touched = (guidance != 0).any(dim=1).flatten(1)  # (B, h * w)
        return Change(
            denoised_change(guidance, step.sigma), touched.any(dim=1), area=touched.float().mean(dim=1)
        )
