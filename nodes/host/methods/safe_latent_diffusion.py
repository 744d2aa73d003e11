"""Safe Latent Diffusion as a correction of the host's denoised prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.safe_latent_diffusion import SafeLatentDiffusionSettings, denoised_change, safety_guidance
from ..engine.correction import COND, UNCOND, Correction, RunContext, Step

SAFETY = "safety"


@dataclass
class Momentum:
    """What a run has accumulated; None before its first step."""

    value: Tensor | None = None

    def or_zeros(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if self.value is None else self.value


class SafeLatentDiffusionCorrection(Correction):
    """Turns the guidance away from a text of unsafe concepts. Needs the guider's positive and negative branches."""

    name = "SLD"

    def __init__(self, safety_text: list[Any], settings: SafeLatentDiffusionSettings) -> None:
        self.texts = {SAFETY: safety_text}
        self.settings = settings

    def begin(self, context: RunContext) -> Momentum:
        return Momentum()

    def carried(self, state: Momentum) -> Tensor | None:
        return state.value

    def resume(self, state: Momentum, carried: Tensor) -> None:
        state.value = carried

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.needs_prediction(level)

    def wanted_texts(self, step: Step, state: Momentum) -> Mapping[str, Tensor]:
        return dict.fromkeys((SAFETY, COND, UNCOND), step.every_row)

    def correct(self, step: Step, state: Momentum) -> Change | None:
        if any(name not in step.predictions for name in (COND, UNCOND)):
            return None
        cond, uncond, safety = (step.predictions[name].float() for name in (COND, UNCOND, SAFETY))
        guidance, momentum = safety_guidance(
            cond, uncond, safety, step.sigma, state.or_zeros(cond), self.settings
        )
        if step.is_new:
            state.value = momentum
        if step.level not in self.settings.window:
            return None
        touched = (guidance != 0).any(dim=1).flatten(1)
        return Change(
            denoised_change(guidance, step.sigma, step.cond_scale),
            touched.any(dim=1),
            area=touched.float().mean(dim=1),
            weight=torch.full_like(touched[:, 0].float(), step.cond_scale),
        )
