"""What a model's cross-attention asks while it looks at given pictures under noise: the data that guideline tokens learn from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...guidance.token_optimization import AttentionCache
from .attention import LayerCall, attention_layer, listen, reads
from .correction import Correction, RunContext, Step
from .runs import attach
from .scheduler import Run

BATCH = 8


class _Recorder(Correction):
    """Keeps the queries of every evaluation of one sampling run: per noise level, by layer."""

    def __init__(self, layers: Collection[int | str]) -> None:
        self.layers = layers
        self.current: dict[str, LayerCall] = {}
        self.levels: list[dict[str, Tensor]] = []
        self.sizes: dict[str, tuple[int, int]] = {}

    def patch(self, model: ModelPatcher) -> None:
        def receiver(run: Run) -> Callable[[LayerCall], None]:
            return self._receive

        listen(model, receiver)

    def begin(self, context: RunContext) -> None:
        self.levels = []

    def is_active(self, level: Any) -> bool:
        return True

    def _receive(self, call: LayerCall) -> None:
        if reads(call, self.layers):
            self.current[call.name] = call

    def correct(self, step: Step, state: None) -> None:
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
    """Cache the queries for pictures under noise at chosen levels. Shows progress; interrupting the prompt interrupts.

    Args:
        model: any UNet model; what is attached to it acts as it does when sampling.
        latents: (N, C, h, w) in VAE space.
        masks: (N, H, W) in [0, 1], where the concept is.
        conditioning: what the pictures show: one row for all, or one for each.
        sigmas: noise levels, in the sampler's units.
        layers: which to keep, by their names or by how many times smaller than the latent their maps are.
        seed: of the noise.

    Raises:
        ValueError: the model has no such layers.
    """
    progress = comfy.utils.ProgressBar(len(latents))
    parts = []
    sizes: dict[str, tuple[int, int]] = {}
    for first in range(0, len(latents), BATCH):
        rows = slice(first, min(first + BATCH, len(latents)))
        recorder = _Recorder(layers)
        _run(attach(model, recorder), latents[rows], _rows_of(conditioning, rows, len(latents)), sigmas, seed + first)
        parts.append(recorder.levels)
        sizes = recorder.sizes
        progress.update_absolute(rows.stop, len(latents))
    if not sizes:
        shown = ", ".join(map(str, layers))
        raise ValueError(f"The model has none of the attention layers {shown}. Choose other scales, or tokens made for this model.")
    return _joined(model, parts, sizes, sigmas, _at_latent_size(masks, latents.shape[-2:]))


def _run(model: ModelPatcher, latents: Tensor, conditioning: list[Any], sigmas: Sequence[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(latents.shape, generator=generator) for _ in sigmas]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    guider.sample(noises[0], latents, _Look(noises), torch.tensor(list(sigmas)), disable_pbar=True, seed=seed)


def _rows_of(conditioning: list[Any], rows: slice, count: int) -> list[Any]:
    """The conditioning of some pictures."""
    return [[c[rows] if len(c) == count else c, options] for c, options in conditioning]


def _joined(
    model: ModelPatcher, parts: list[list[dict[str, Tensor]]], sizes: dict[str, tuple[int, int]], sigmas: Sequence[float], masks: Tensor
) -> AttentionCache:
    names = tuple(sizes)
    queries = tuple(tuple(torch.cat([part[level][name] for part in parts]) for name in names) for level in range(len(sigmas)))
    comfy.model_management.load_models_gpu([model])
    unet = model.model.diffusion_model
    weights = tuple(_weight(attention_layer(unet, name).to_k) for name in names)
    return AttentionCache(names, weights, queries, tuple(sizes[name] for name in names), tuple(sigmas), masks)


def _weight(projection: Any) -> Tensor:
    """A linear layer's weight as the host applies it, patches included: its answers to the unit vectors."""
    like = next(projection.parameters())
    eye = torch.eye(projection.in_features, device=comfy.model_management.get_torch_device(), dtype=like.dtype)
    return projection(eye).T.float().cpu()


def _at_latent_size(masks: Tensor, size: torch.Size) -> Tensor:
    """(N, H, W) in [0, 1] -> (N, h, w) bool, true where more than half of a position is masked."""
    return F.interpolate(masks[:, None].float(), size=tuple(size), mode="area")[:, 0] > 0.5
