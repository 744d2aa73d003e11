"""Windows of the noise schedule, for any model of the host."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher

from ....guidance.core.noise_level import SigmaWindow
from .schedule import noise_level


def percent_window(model: ModelPatcher, start: float, end: float) -> SigmaWindow:
    """Return the noise levels between two fractions of the model's schedule, from 0 (start) to 1 (end).

    Raises:
        ValueError: the end comes before the start.
    """
    if start > end:
        raise ValueError(
            f"The window runs from {start:.0%} to {end:.0%} of the schedule. "
            "Make its start smaller than its end."
        )
    sampling = model.get_model_object("model_sampling")

    def sigma_at(percent: float) -> float:
        return noise_level(sampling, torch.tensor([sampling.percent_to_sigma(percent)])).sigma

    return SigmaWindow(high=sigma_at(start), low=sigma_at(end))
