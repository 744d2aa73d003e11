"""The host's own KSampler, for nodes that sample."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher

import nodes

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
    """Sample exactly as the host's KSampler node does, with its previews and masks, and return a LATENT."""
    # `nodes` is the host's module here; a type checker sees the pack's folder of that name.
    run = nodes.common_ksampler  # type: ignore[attr-defined]
    settings = (model, seed, steps, cfg, sampler_name, scheduler)
    sampled: dict[str, Any] = run(*settings, positive, negative, latent, denoise=denoise)[0]
    return sampled
