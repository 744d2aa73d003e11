"""Recording cross-attention queries, of given images under noise or of images while the model samples them.

Guideline tokens are learnt from either. The paper records images that the model samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.attention_cache import AttentionCache
from ..engine.correction import Correction, RunContext, Step
from ..engine.hooks import attach
from ..engine.run import Run
from .capture import LayerCall, Receiver, attention_layer, listen, reads

BATCH = 8
SAME_SIGMA = 1e-3
"""Relative tolerance between a sampler's noise level and that of its schedule; some samplers recompute it."""


@dataclass
class _Recording:
    """Queries of a sampling run.

    Attributes:
        levels: per recorded noise level, the queries (B, heads, height * width, d) by layer.
        sizes: (height, width) of the map, by layer.
    """

    levels: list[dict[str, Tensor]] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class _RecordingState:
    """State of one run: the noise levels still to be recorded, and the current evaluation's layer calls."""

    remaining: list[float]
    calls: dict[str, LayerCall] = field(default_factory=dict)


class _RecordingCorrection(Correction):
    """Correction that changes nothing and writes the queries of a sampling run into a recording.

    Args:
        layers: layers to record, by name or by how many times smaller than the latent their map is.
        recording: receives the queries of the last run.
        sigmas: noise levels to record, each at its first evaluation; None for every evaluation.
    """

    name = ""

    def __init__(
        self, layers: Collection[int | str], recording: _Recording, sigmas: Sequence[float] | None = None
    ) -> None:
        self.layers, self.recording, self.sigmas = layers, recording, sigmas

    def patch(self, model: ModelPatcher) -> None:
        def receiver_of(run: Run) -> Receiver:
            state: _RecordingState = run.state_of(self)

            def receive(call: LayerCall) -> None:
                if reads(call, self.layers):
                    state.calls[call.name] = call

            return receive

        listen(model, receiver_of)

    def begin(self, context: RunContext) -> _RecordingState:
        # With a two-pass method on the model a run begins twice; the recording keeps the second pass.
        self.recording.levels.clear()
        return _RecordingState(list(self.sigmas or ()))

    def is_active(self, level: Any) -> bool:
        return True

    def correct(self, step: Step, state: _RecordingState) -> None:
        if self.sigmas is not None:
            if not state.remaining or not math.isclose(step.sigma, state.remaining[0], rel_tol=SAME_SIGMA):
                return
            state.remaining.pop(0)
        queries = {name: call.queries() for name, call in state.calls.items()}
        self.recording.levels.append({name: q.values.to("cpu", torch.float16) for name, q in queries.items()})
        self.recording.sizes |= {name: q.size for name, q in queries.items()}
        state.calls = {}


class _Look(comfy.samplers.Sampler):
    """Sampler that evaluates the model once per noise level on the noised latent, and returns the latent."""

    def __init__(self, noises: Sequence[Tensor]) -> None:
        self.noises = noises

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        model_sampling = model_wrap.inner_model.model_sampling
        for sigma, own_noise in zip(sigmas, self.noises):
            x = model_sampling.noise_scaling(sigma, own_noise.to(latent_image), latent_image)
            model_wrap(x, sigma.expand(len(x)), **extra_args)
        return latent_image


def look_at(
    model: ModelPatcher,
    latents: Tensor,
    masks: Tensor,
    conditioning: list[Any],
    sigmas: Sequence[float],
    layers: Collection[int | str],
    seed: int,
) -> AttentionCache:
    """Record the queries for images under noise at chosen levels.

    Shows progress, and stops when the prompt is interrupted.

    Args:
        model: any UNet model; corrections attached to it act as they do when sampling.
        latents: (N, C, h, w) in VAE space.
        masks: (N, H, W) in [0, 1], 1 where the image shows the concept.
        conditioning: the images' prompt as CONDITIONING, with one row for all images or one per image.
        sigmas: noise levels, in the sampler's units.
        layers: layers to record, by name or by how many times smaller than the latent their map is.
        seed: seed of the noise.

    Raises:
        ValueError: the model has no such layers.
    """
    progress = comfy.utils.ProgressBar(len(latents))
    recordings = []
    for first in range(0, len(latents), BATCH):
        batch = slice(first, min(first + BATCH, len(latents)))
        prompt = _conditioning_of(conditioning, batch, len(latents))
        recordings.append(_Recording())
        recorded_model = attach(model, _RecordingCorrection(layers, recordings[-1]))
        _run(recorded_model, latents[batch], prompt, sigmas, seed + first)
        progress.update_absolute(batch.stop, len(latents))
    return _joined(model, layers, recordings, sigmas, latents.shape[-2:]).with_masks(masks)


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a KSampler run."""

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str


def sample_and_look(
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

    These are the steps nearest to given noise levels. Shows progress over all images with previews, and stops
    when the prompt is interrupted.

    Args:
        model: any UNet model; corrections attached to it act.
        conditionings: each image's positive CONDITIONING.
        negative: the negative CONDITIONING of all images.
        seeds: each image's seed.
        latent: LATENT whose first sample every image starts from.
        sampler: settings for all images.
        sigmas: noise levels in the sampler's units, highest first; levels nearest to the same step count
            once.
        layers: layers to record, as in `look_at`.

    Returns:
        Latents (N, C, h, w) in VAE space, and the recorded queries without masks.

    Raises:
        ValueError: the model has no such layers, or the sampler chooses its own noise levels.
    """
    schedule = comfy.samplers.KSampler(
        model, sampler.steps, model.load_device, sampler.sampler_name, sampler.scheduler, 1.0
    ).sigmas
    levels = nearest_levels(schedule[:-1].tolist(), sigmas)
    start = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"][:1], latent.get("downscale_ratio_spacial")
    )
    total = sampler.steps * len(seeds)
    preview = latent_preview.prepare_callback(model, total)
    recordings: list[_Recording] = []
    latents = []
    for index, (positive, seed) in enumerate(zip(conditionings, seeds)):

        def callback(step: int, x0: Tensor, x: Tensor, steps: int, index: int = index) -> None:
            preview(index * sampler.steps + step, x0, x, total)

        recordings.append(_Recording())
        latents.append(
            comfy.sample.sample(
                attach(model, _RecordingCorrection(layers, recordings[-1], levels)),
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
        )
        if len(recordings[-1].levels) < len(levels):
            raise ValueError(
                f"The sampler {sampler.sampler_name} chooses its own noise levels. "
                "Choose another one, such as euler."
            )
    return torch.cat(latents), _joined(model, layers, recordings, levels, start.shape[-2:])


def nearest_levels(schedule: Sequence[float], sigmas: Sequence[float]) -> list[float]:
    """Return the levels of a schedule nearest to given ones in ratio, each once and highest first."""

    def nearest(sigma: float) -> float:
        return min(schedule, key=lambda level: abs(math.log(level / sigma)))

    return sorted({nearest(sigma) for sigma in sigmas}, reverse=True)


def _run(
    model: ModelPatcher, latents: Tensor, conditioning: list[Any], sigmas: Sequence[float], seed: int
) -> None:
    """Evaluate the model once per noise level on the latents under fresh noise, without CFG."""
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(latents.shape, generator=generator) for _ in sigmas]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    guider.sample(noises[0], latents, _Look(noises), torch.tensor(list(sigmas)), disable_pbar=True, seed=seed)


def _conditioning_of(conditioning: list[Any], batch: slice, count: int) -> list[Any]:
    """Return the conditioning of a batch out of `count` images; a row for all images stays as it is."""

    def part(value: Any) -> Any:
        is_per_image = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
        return value[batch] if is_per_image else value

    return [[part(c), {name: part(value) for name, value in options.items()}] for c, options in conditioning]


def _joined(
    model: ModelPatcher,
    layers: Collection[int | str],
    recordings: Sequence[_Recording],
    sigmas: Sequence[float],
    latent_size: torch.Size,
) -> AttentionCache:
    """Return the recordings of several runs as one cache, without masks."""
    sizes = recordings[0].sizes
    if not sizes:
        shown = ", ".join(map(str, layers))
        raise ValueError(
            f"The model has none of the attention layers {shown}. "
            "Choose other scales, or tokens made for this model."
        )
    queries = tuple(
        tuple(torch.cat([recording.levels[level][name] for recording in recordings]) for name in sizes)
        for level in range(len(sigmas))
    )
    comfy.model_management.load_models_gpu([model])
    unet = model.model.diffusion_model
    weights = tuple(_weight(attention_layer(unet, name).to_k) for name in sizes)
    masks = torch.zeros(queries[0][0].shape[0], *latent_size, dtype=torch.bool)
    return AttentionCache(tuple(sizes), weights, queries, tuple(sizes.values()), tuple(sigmas), masks)


def _weight(projection: Any) -> Tensor:
    """Return a linear layer's weight as the host applies it, with LoRAs: its outputs for unit vectors."""
    like = next(projection.parameters())
    eye = torch.eye(
        projection.in_features, device=comfy.model_management.get_torch_device(), dtype=like.dtype
    )
    return projection(eye).T.float().cpu()
