"""One scheduler for the corrections of all methods on a model, with state that lives as long as a sampling run.

A node attaches corrections to a MODEL. While the host samples, every model evaluation ends here with the denoised
prediction of whatever guider is in use: the active corrections get it together with the extra predictions they asked for
(evaluated in one batch, identical texts once), and their changes are summed under a joint cap.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...guidance.composition import Change, SigmaClock, combine
from ...guidance.noise_level import NoiseLevel

KEY = "safe_guidance"


@dataclass(frozen=True)
class RunContext:
    """What is known when a sampling run starts, before the model is loaded.

    `latent_shape` is (B, C, h, w) or (B, C, T, h, w); `denoise_mask` is the host's inpainting mask at that size, 1 where
    the picture is sampled.
    """

    model: ModelPatcher
    latent_shape: tuple[int, ...]
    denoise_mask: Tensor | None


@dataclass(frozen=True)
class Step:
    """One model evaluation: noisy latent, its noise level, and the uncorrected prediction, all in the model's latent space."""

    x: Tensor
    sigma: float
    level: NoiseLevel
    denoised: Tensor
    predictions: dict[str, Tensor]
    denoise_mask: Tensor | None
    is_new: bool
    """False when the solver visits a noise level again, so that state must not advance."""


class Correction:
    """A method attached to a model. One object serves many runs, so it holds settings only."""

    texts: dict[str, list[Any]] = {}
    """CONDITIONING by name, of which `wanted_texts` may ask for predictions."""

    def begin(self, context: RunContext) -> Any:
        """Make what the run needs (state, prepared tensors). May load other models; the sampled one is not loaded yet."""
        return None

    def is_active(self, level: NoiseLevel) -> bool:
        """Whether the method may act at a noise level. When it may not, neither `correct` nor any forward runs for it."""
        raise NotImplementedError

    def wanted_texts(self, state: Any) -> Collection[str]:
        """Names of `texts` whose predictions `correct` needs at this step."""
        return ()

    def correct(self, step: Step, state: Any) -> Change | None:
        """The change for this step, or None when there is nothing to do."""
        raise NotImplementedError


def attach(model: ModelPatcher, correction: Correction) -> ModelPatcher:
    """A clone of `model` whose sampling runs include `correction`, in addition to those attached before."""
    patched = model.clone()
    attached: tuple[Correction, ...] = patched.model_options.get(KEY, ())
    patched.model_options[KEY] = (*attached, correction)
    if not attached:
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    return patched


def noise_level(model_sampling: Any, sigma: Tensor) -> NoiseLevel:
    """The forward process at a sampler's sigma, from the host's own way of adding noise, whatever the model family."""
    one, zero = torch.ones(1, 1, device=sigma.device), torch.zeros(1, 1, device=sigma.device)
    sigma = sigma[:1].float()
    signal = model_sampling.noise_scaling(sigma, zero, one)
    noise = model_sampling.noise_scaling(sigma, one, zero)
    return NoiseLevel(signal.item(), noise.item())


class Run:
    """State of one sampling run."""

    def __init__(self, corrections: Sequence[Correction], context: RunContext, guider: Any) -> None:
        self._corrections = corrections
        self._context = context
        self._clock = SigmaClock()
        self._text_keys: dict[tuple[int, str], str] = {}
        self._register_texts(guider)
        self._states = [correction.begin(context) for correction in corrections]

    def _register_texts(self, guider: Any) -> None:
        # Conditionings that the guider holds are prepared by the host like its own: areas, timestep ranges, ControlNet.
        known: list[tuple[list[Any], str]] = []
        for index, correction in enumerate(self._corrections):
            for name, conditioning in correction.texts.items():
                key = next((key for other, key in known if _same_conditioning(conditioning, other)), None)
                if key is None:
                    key = f"{KEY}_{len(known)}"
                    known.append((conditioning, key))
                    guider.conds[key] = comfy.sampler_helpers.convert_cond(conditioning)
                    for entry in guider.conds[key]:
                        entry.setdefault("prompt_type", "positive")
                self._text_keys[index, name] = key

    def corrected(self, denoised: Tensor, x: Tensor, timestep: Tensor, guider: Any, model_options: dict[str, Any]) -> Tensor:
        """The prediction with the changes of all corrections that are active at this noise level."""
        level = noise_level(guider.inner_model.model_sampling, timestep)
        is_new = self._clock.advance(float(timestep[0]))
        active = [i for i, correction in enumerate(self._corrections) if correction.is_active(level)]
        if not active:
            return denoised
        predictions = self._predict_texts(active, x, timestep, guider, model_options)
        changes = []
        for index in active:
            own = {name: predictions[key] for (i, name), key in self._text_keys.items() if i == index and key in predictions}
            step = Step(x, float(timestep[0]), level, denoised, own, self._context.denoise_mask, is_new)
            change = self._corrections[index].correct(step, self._states[index])
            if change is not None:
                changes.append(change)
        return combine(denoised, changes, self._context.denoise_mask)

    def _predict_texts(
        self, active: list[int], x: Tensor, timestep: Tensor, guider: Any, model_options: dict[str, Any]
    ) -> dict[str, Tensor]:
        keys = dict.fromkeys(self._text_keys[i, name] for i in active for name in self._corrections[i].wanted_texts(self._states[i]))
        if not keys:
            return {}
        conds = [guider.conds[key] for key in keys]
        return dict(zip(keys, comfy.samplers.calc_cond_batch(guider.inner_model, conds, x, timestep, model_options)))


def _same_conditioning(a: list[Any], b: list[Any]) -> bool:
    """Whether two conditionings are the same text: equal embeddings, and options that are equal or the same objects."""
    if a is b:
        return True
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0]) and x[1].keys() == y[1].keys() and all(_same_value(x[1][k], y[1][k]) for k in x[1]) for x, y in zip(a, b)
    )


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b or (isinstance(a, str | int | float) and a == b)


def _outer_sample(
    executor: Callable[..., Tensor],
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *args: Any,
    latent_shapes: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> Tensor:
    guider = executor.class_obj  # type: ignore[attr-defined]
    if latent_shapes is not None:
        if len(latent_shapes) > 1:
            raise ValueError("Safe Guidance does not work on models that sample several latents at once. Remove its nodes from this MODEL.")
        kwargs["latent_shapes"] = latent_shapes
    context = RunContext(guider.model_patcher, tuple(noise.shape), denoise_mask)
    # The guider's options are a copy made for this run: what is put there reaches every hook and ends with the run.
    guider.model_options["transformer_options"][KEY] = Run(guider.model_options[KEY], context, guider)
    return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)


def _predict_noise(
    executor: Callable[..., Tensor], x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
) -> Tensor:
    model_options = model_options or {}
    denoised = executor(x, timestep, model_options, seed)
    run: Run = model_options["transformer_options"][KEY]
    return run.corrected(denoised, x, timestep, executor.class_obj, model_options)  # type: ignore[attr-defined]
