"""What a method is to the scheduler: a correction, what it is told about a run and a step, and what it may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel

KEY = "safe_guidance"
"""Under which the pack keeps what is its own in the host's options, hooks and lists."""

COND, UNCOND = "positive", "negative"
"""The guider's own branches, by the host's names; `Correction.wanted_texts` may ask for them too, for guiders that skip one."""


@dataclass(frozen=True)
class RunContext:
    """What is known when a sampling run starts, before the model is loaded.

    `latent_shape` is (B, C, h, w) or (B, C, T, h, w); `latent` is what sampling starts from, as the VAE makes it (zeros for
    an empty one); `denoise_mask` is the host's inpainting mask at that size, 1 where the image is sampled.
    """

    model: ModelPatcher
    latent_shape: tuple[int, ...]
    latent: Tensor
    denoise_mask: Tensor | None


@dataclass(frozen=True)
class Step:
    """One model evaluation, all of it in the model's latent space.

    Attributes:
        x: (B, C, h, w) noisy latent.
        sigma: the sampler's noise level.
        level: the same as a forward process.
        denoised: the guider's prediction, not corrected.
        predictions: denoised predictions by name: those asked for, with `denoised` in the rows that were not, and the
            guider's own branches COND and UNCOND when it evaluated them.
        cond_scale: the guider's CFG scale.
        denoise_mask: the host's inpainting mask or None.
        is_new: False when the solver visits a noise level again, so that state must not advance.
    """

    x: Tensor
    sigma: float
    level: NoiseLevel
    denoised: Tensor
    predictions: Mapping[str, Tensor]
    cond_scale: float
    denoise_mask: Tensor | None
    is_new: bool

    @property
    def every_row(self) -> Tensor:
        """(B,) bool, all True."""
        return torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)


@dataclass(frozen=True)
class Evaluation:
    """The host's side of a model evaluation, as its `calc_cond_batch` wants it."""

    guider: Any
    x: Tensor
    timestep: Tensor
    model_options: dict[str, Any]


class Correction:
    """A method attached to a model. One object serves many runs, so it holds settings only."""

    name: str = "correction"
    """What the method is called in a trace; empty for one that only reads along, of which its user is told nothing."""

    node: str | None = None
    """Id of the node that attached it, for messages to its user."""

    texts: dict[str, list[Any]] = {}
    """CONDITIONING by name, of which `wanted_texts` may ask for predictions."""

    def patch(self, model: ModelPatcher) -> None:
        """Put further hooks on the clone of the model that this correction is attached to."""

    rehearses: bool = False
    """Whether every run is sampled once before, in which this correction only watches, to keep what it does not act on."""

    def begin(self, context: RunContext) -> Any:
        """Make what the run needs (state, prepared tensors). May load other models; the sampled one is not loaded yet."""
        return None

    def carried(self, state: Any) -> Any:
        """What a run needs that goes on where this one stopped (KSampler Advanced in parts), kept after this one; None for nothing."""
        return None

    def resume(self, state: Any, carried: Any) -> None:
        """Go on with what the part before has `carried`, not None. Called right after `begin`."""

    def watch(self, step: Step, state: Any) -> None:
        """See one step of the rehearsal. Called in it instead of `steer`, `wanted_texts` and `correct`; needs `rehearses`."""

    def region(self, state: Any) -> Tensor | None:
        """Where the correction will act in the run, (B, 1, h, w) bool, once the rehearsal is over; None for nowhere at all.

        The run goes on with the same state.
        """
        return None

    def is_active(self, level: NoiseLevel) -> bool:
        """Whether the method may act at a noise level. When it may not, nothing below is called and no forward runs for it."""
        raise NotImplementedError

    def steer(self, step: Step, state: Any, evaluation: Evaluation) -> Tensor | None:
        """Change the run's conditioning (`evaluation.guider.conds`). Returns (B,) bool, the rows whose prediction must be made anew."""
        return None

    def wanted_texts(self, step: Step, state: Any) -> Mapping[str, Tensor]:
        """Names, of `texts` or COND or UNCOND, whose predictions `correct` needs, each with the rows (B,) bool that need it."""
        return {}

    def correct(self, step: Step, state: Any) -> Change | None:
        """The change for this step, or None when there is nothing to do."""
        raise NotImplementedError
