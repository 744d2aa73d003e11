"""What a model's cross-attention asks: of given images under noise, or along the way while the model makes them.

Either is what guideline tokens are learnt from. The paper records images that the model makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
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
from .capture import LayerCall, attention_layer, listen, reads

BATCH = 8
SAME_SIGMA = 1e-3
"""Relative difference up to which a sampler's noise level is that of its schedule: some samplers compute it anew."""


class _Recorder(Correction):
    """Keeps the queries of the last sampling run: per noise level, by layer. Of all evaluations, or of the first at each of some levels."""

    name = ""

    def __init__(self, layers: Collection[int | str], sigmas: Sequence[float] | None = None) -> None:
        self.layers = layers
        self.sigmas = sigmas
        self.current: dict[str, LayerCall] = {}
        self.levels: list[dict[str, Tensor]] = []
        self.sizes: dict[str, tuple[int, int]] = {}

    def patch(self, model: ModelPatcher) -> None:
        def receiver(run: Run) -> Callable[[LayerCall], None]:
            return self._receive

        listen(model, receiver)

    def begin(self, context: RunContext) -> list[float]:
        # A run may be rehearsed, so it begins twice: what is still to be kept is the run's own.
        self.levels = []
        return list(self.sigmas or ())

    def is_active(self, level: Any) -> bool:
        return True

    def _receive(self, call: LayerCall) -> None:
        if reads(call, self.layers):
            self.current[call.name] = call

    def correct(self, step: Step, state: list[float]) -> None:
        if self.sigmas is not None:
            if not state or not math.isclose(step.sigma, state[0], rel_tol=SAME_SIGMA):
                return
            state.pop(0)
        queries = {name: call.queries() for name, call in self.current.items()}
        self.levels.append({name: q.values.to("cpu", torch.float16) for name, q in queries.items()})
        self.sizes |= {name: q.size for name, q in queries.items()}
        self.current = {}


class _Look(comfy.samplers.Sampler):
    """Evaluates the model once at every noise level on the latent under fresh noise, and samples nothing."""

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
    """Cache the queries for images under noise at chosen levels. Shows progress; interrupting the prompt interrupts.

    Args:
        model: any UNet model; what is attached to it acts as it does when sampling.
        latents: (N, C, h, w) in VAE space.
        masks: (N, H, W) in [0, 1], where the concept is.
        conditioning: what the images show: one row for all, or one for each.
        sigmas: noise levels, in the sampler's units.
        layers: which to keep, by their names or by how many times smaller than the latent their maps are.
        seed: of the noise.

    Raises:
        ValueError: the model has no such layers.
    """
    progress = comfy.utils.ProgressBar(len(latents))
    recorders = []
    for first in range(0, len(latents), BATCH):
        rows = slice(first, min(first + BATCH, len(latents)))
        recorders.append(_Recorder(layers))
        _run(
            attach(model, recorders[-1]),
            latents[rows],
            _rows_of(conditioning, rows, len(latents)),
            sigmas,
            seed + first,
        )
        progress.update_absolute(rows.stop, len(latents))
    return _joined(model, recorders, sigmas, latents.shape[-2:]).with_masks(masks)


@dataclass(frozen=True)
class SamplerSettings:
    """How images are made, as KSampler takes it."""

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
    """Make images one by one, each exactly as KSampler makes it, and cache the queries at the steps nearest to some noise levels.

    Shows progress over all images with previews; interrupting the prompt interrupts.

    Args:
        model: any UNet model; what is attached to it acts.
        conditionings: what each image shows.
        negative: what none shows.
        seeds: of each image's noise.
        latent: of which the first row is what every image starts from.
        sampler: for all images.
        sigmas: noise levels, highest first, in the sampler's units; those nearest to the same step are one.
        layers: which to keep, as in `look_at`.

    Returns:
        latents (N, C, h, w) in VAE space, and the cache, without masks.

    Raises:
        ValueError: the model has no such layers, or the sampler does not stop at the noise levels of its schedule.
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
    recorders, latents = [], []
    for index, (positive, seed) in enumerate(zip(conditionings, seeds)):

        def callback(step: int, x0: Tensor, x: Tensor, steps: int, index: int = index) -> None:
            preview(index * sampler.steps + step, x0, x, total)

        recorders.append(_Recorder(layers, levels))
        latents.append(
            comfy.sample.sample(
                attach(model, recorders[-1]),
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
        if len(recorders[-1].levels) < len(levels):
            raise ValueError(
                f"The sampler {sampler.sampler_name} chooses its own noise levels. Choose another one, such as euler."
            )
    return torch.cat(latents), _joined(model, recorders, levels, start.shape[-2:])


def nearest_levels(schedule: Sequence[float], sigmas: Sequence[float]) -> list[float]:
    """The levels of a schedule that are nearest to given ones, in ratio; highest first, each once."""
    return sorted(
        {min(schedule, key=lambda level: abs(math.log(level / sigma))) for sigma in sigmas}, reverse=True
    )


def _run(
    model: ModelPatcher, latents: Tensor, conditioning: list[Any], sigmas: Sequence[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(latents.shape, generator=generator) for _ in sigmas]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    guider.sample(noises[0], latents, _Look(noises), torch.tensor(list(sigmas)), disable_pbar=True, seed=seed)


def _rows_of(conditioning: list[Any], rows: slice, count: int) -> list[Any]:
    """The conditioning of some images."""

    def part(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == count else value

    return [[part(c), {name: part(value) for name, value in options.items()}] for c, options in conditioning]


def _joined(
    model: ModelPatcher, recorders: Sequence[_Recorder], sigmas: Sequence[float], latent_size: torch.Size
) -> AttentionCache:
    """What several runs recorded, without masks."""
    layers, sizes = recorders[0].layers, recorders[0].sizes
    if not sizes:
        shown = ", ".join(map(str, layers))
        raise ValueError(
            f"The model has none of the attention layers {shown}. Choose other scales, or tokens made for this model."
        )
    queries = tuple(
        tuple(torch.cat([r.levels[level][name] for r in recorders]) for name in sizes)
        for level in range(len(sigmas))
    )
    comfy.model_management.load_models_gpu([model])
    unet = model.model.diffusion_model
    weights = tuple(_weight(attention_layer(unet, name).to_k) for name in sizes)
    masks = torch.zeros(queries[0][0].shape[0], *latent_size, dtype=torch.bool)
    return AttentionCache(tuple(sizes), weights, queries, tuple(sizes.values()), tuple(sigmas), masks)


def _weight(projection: Any) -> Tensor:
    """A linear layer's weight as the host applies it, patches included: its answers to the unit vectors."""
    like = next(projection.parameters())
    eye = torch.eye(
        projection.in_features, device=comfy.model_management.get_torch_device(), dtype=like.dtype
    )
    return projection(eye).T.float().cpu()
