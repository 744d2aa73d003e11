"""Recording of the cross-attention queries of images while the model samples them, as in the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.attention_cache import AttentionCache
from ..engine.hooks import attach
from .recording import Recording, RecordingCorrection, joined

Callback = Callable[[int, Tensor, Tensor, int], None]
"""The host's callback of a sampler: step, prediction, noisy latent and number of steps."""


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a KSampler run."""

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str


def sample_and_record(
    model: ModelPatcher,
    conditionings: Sequence[list[Any]],
    negative: list[Any],
    seeds: Sequence[int],
    latent: dict[str, Any],
    sampler: SamplerSettings,
    sigmas: Sequence[float],
    layers: Collection[int | str],
) -> tuple[Tensor, AttentionCache]:
    """Sample images one by one, exactly as KSampler does, and record the queries at some of the steps.

    These are the steps nearest to the given noise levels. Shows previews and the progress over all images,
    and stops when the prompt is interrupted.

    Args:
        model: any UNet model; corrections attached to it act.
        conditionings: each image's positive CONDITIONING.
        negative: the negative CONDITIONING of all images.
        seeds: each image's seed.
        latent: LATENT whose first sample every image starts from.
        sampler: settings for all images.
        sigmas: noise levels in the sampler's units. Levels nearest to the same step count once.
        layers: layers to record, by name or by how many times smaller than the latent their map is.

    Returns:
        Latents (N, C, h, w) in VAE space, and the recorded queries without masks, highest noise level first.

    Raises:
        ValueError: the model has no such layers, or the sampler chooses its own noise levels.
    """
    levels = nearest_levels(_schedule(model, sampler)[:-1].tolist(), sigmas)
    start = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"][:1], latent.get("downscale_ratio_spacial")
    )
    recordings: list[Recording] = []
    latents = []
    callbacks = _callbacks(model, sampler.steps, len(seeds))
    for positive, seed, callback in zip(conditionings, seeds, callbacks):
        recordings.append(Recording())
        recorded_model = attach(model, RecordingCorrection(layers, recordings[-1], levels))
        latents.append(_sample(recorded_model, positive, negative, seed, start, sampler, callback))
        if len(recordings[-1].levels) < len(levels):
            raise ValueError(
                f"The sampler {sampler.sampler_name} chooses its own noise levels. "
                "Choose another one, such as euler."
            )
    return torch.cat(latents), joined(model, layers, recordings, levels, start.shape[-2:])


def _schedule(model: ModelPatcher, sampler: SamplerSettings) -> Tensor:
    """Return the noise levels of a KSampler run, (steps + 1,)."""
    names = (sampler.sampler_name, sampler.scheduler)
    run = comfy.samplers.KSampler(model, sampler.steps, model.load_device, *names, 1.0)
    return run.sigmas


def _sample(
    model: ModelPatcher,
    positive: list[Any],
    negative: list[Any],
    seed: int,
    start: Tensor,
    sampler: SamplerSettings,
    callback: Callback,
) -> Tensor:
    """Sample one image as KSampler does, and return its latent (1, C, h, w)."""
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(start, seed),
        sampler.steps,
        sampler.cfg,
        sampler.sampler_name,
        sampler.scheduler,
        positive,
        negative,
        start,
        callback=callback,
        disable_pbar=True,
        seed=seed,
    )


def _callbacks(model: ModelPatcher, steps: int, count: int) -> Iterator[Callback]:
    """Yield the callback of each of `count` runs, which show previews and the progress over all of them."""
    total = steps * count
    preview = latent_preview.prepare_callback(model, total)
    for index in range(count):

        def callback(step: int, x0: Tensor, x: Tensor, _steps: int, done: int = index * steps) -> None:
            preview(done + step, x0, x, total)

        yield callback


def nearest_levels(schedule: Sequence[float], sigmas: Sequence[float]) -> list[float]:
    """Return the levels of a schedule nearest to given ones in ratio, each once and highest first."""

    def nearest(sigma: float) -> float:
        return min(schedule, key=lambda level: abs(math.log(level / sigma)))

    return sorted({nearest(sigma) for sigma in sigmas}, reverse=True)
