"""Recording of the cross-attention queries of given images under noise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.detect_and_guide.attention_cache import AttentionCache
from ..engine.correction import Correction
from ..engine.hooks import attach
from ..engine.run import noise_level
from .recording import Recording, RecordingCorrection, joined

BATCH = 8


def record_latents(
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
        sigmas: noise levels, as noise-to-signal ratios.
        layers: layers to record, by name or by how many times smaller than the latent their map is.
        seed: seed of the noise.

    Raises:
        ValueError: the model has no such layers.
    """
    recordings: list[Recording] = []

    def correction_of(batch: slice) -> RecordingCorrection:
        recordings.append(Recording())
        return RecordingCorrection(layers, recordings[-1])

    evaluate_latents(model, correction_of, latents, conditioning, sigmas, seed)
    return joined(model, layers, recordings, sigmas, latents.shape[-2:]).with_masks(masks)


def evaluate_latents(
    model: ModelPatcher,
    correction_of: Callable[[slice], Correction],
    latents: Tensor,
    conditioning: list[Any],
    sigmas: Sequence[float],
    seed: int,
    batch_size: int = BATCH,
) -> None:
    """Evaluate the model on images under noise at chosen levels, with a correction for each batch.

    Shows progress, and stops when the prompt is interrupted.

    Args:
        model: any model; corrections attached to it act as they do when sampling.
        correction_of: makes the correction for a batch, given as a slice of the images.
        latents: (N, C, h, w) or (N, C, 1, h, w) in VAE space.
        conditioning: the images' prompt as CONDITIONING, with one row for all images or one per image.
        sigmas: noise levels, as noise-to-signal ratios.
        seed: of the noise.
        batch_size: number of images that are evaluated together.
    """
    progress = comfy.utils.ProgressBar(len(latents))
    of_sampler = _sampler_sigmas(model, sigmas)
    for first in range(0, len(latents), batch_size):
        batch = slice(first, min(first + batch_size, len(latents)))
        prompt = _conditioning_of(conditioning, batch, len(latents))
        _run(attach(model, correction_of(batch)), latents[batch], prompt, of_sampler, seed + first)
        progress.update_absolute(batch.stop, len(latents))


def _sampler_sigmas(model: ModelPatcher, ratios: Sequence[float]) -> list[float]:
    """Return noise-to-signal ratios in the sampler's units, which for rectified flow are s / (1 + s)."""
    model_sampling = model.get_model_object("model_sampling")
    is_flow = noise_level(model_sampling, torch.tensor([0.5])).signal < 1
    return [ratio / (1 + ratio) if is_flow else ratio for ratio in ratios]


def _conditioning_of(conditioning: list[Any], batch: slice, count: int) -> list[Any]:
    """Return the conditioning of a batch out of `count` images; a row for all images stays as it is."""

    def part(value: Any) -> Any:
        is_per_image = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
        return value[batch] if is_per_image else value

    return [[part(c), {name: part(value) for name, value in options.items()}] for c, options in conditioning]


def _run(
    model: ModelPatcher, latents: Tensor, conditioning: list[Any], sigmas: Sequence[float], seed: int
) -> None:
    """Evaluate the model once per noise level on the latents under fresh noise, without CFG."""
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(latents.shape, generator=generator) for _ in sigmas]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    guider.sample(
        noises[0], latents, _OncePerLevel(noises), torch.tensor(list(sigmas)), disable_pbar=True, seed=seed
    )


class _OncePerLevel(comfy.samplers.Sampler):
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
