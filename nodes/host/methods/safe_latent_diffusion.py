"""Safe Latent Diffusion as a correction of the host's denoised prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.safe_latent_diffusion import SafeLatentDiffusionSettings, denoised_change, safety_guidance
from ..engine.correction import COND, UNCOND, Step
from .momentum import Momentum, MomentumCorrection

SAFETY = "safety"


class SafeLatentDiffusionCorrection(MomentumCorrection):
    """Guidance away from a text of unsafe concepts. Needs the guider's positive and negative branches."""

    name = "SLD"

    def __init__(self, safety_text: list[Any], settings: SafeLatentDiffusionSettings) -> None:
        self.texts = {SAFETY: safety_text}
        self.settings = settings

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.needs_prediction(level)

    def wanted_texts(self, step: Step, state: Momentum) -> Mapping[str, Tensor]:
        return dict.fromkeys((SAFETY, COND, UNCOND), step.every_row)

    def correct(self, step: Step, state: Momentum) -> Change | None:
        if any(name not in step.predictions for name in (COND, UNCOND)):
            return None
        cond = step.predictions[COND].float()
        uncond = step.predictions[UNCOND].float()
        safety = step.predictions[SAFETY].float()
        guidance, momentum = safety_guidance(
            cond, uncond, safety, step.sigma, state.or_zeros(cond), self.settings
        )
        if step.is_new:
            state.value = momentum
        if step.level not in self.settings.window:
            return None
        touched = (guidance != 0).any(dim=1).flatten(1)  # (B, h * w)
        return Change(
            denoised_change(guidance, step.sigma, step.cond_scale),
            touched.any(dim=1),
            area=touched.float().mean(dim=1),
            weight=torch.full_like(touched[:, 0].float(), step.cond_scale),
        )
