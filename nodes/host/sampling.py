"""The host's own KSampler, for nodes that sample."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import nodes
from comfy.model_patcher import ModelPatcher

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


def sample(
    model: ModelPatcher,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list[Any],
    negative: list[Any],
    latent: dict[str, Any],
    denoise: float,
) -> dict[str, Any]:
    """Exactly what the host's KSampler node does, with its previews, masks and batch indices."""
    return nodes.common_ksampler(model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent, denoise=denoise)[0]
