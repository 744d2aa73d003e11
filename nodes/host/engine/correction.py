"""Interface between a guidance method and the sampling engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from .frames import Frames

KEY = "safe_guidance"
"""The pack's key in the host's options, hooks and lists."""

COND, UNCOND = "positive", "negative"
"""The guider's own branches, by the host's names. `wanted_texts` may ask for them if the guider skips one."""


@dataclass(frozen=True)
class RunContext:
    """Facts about a sampling run, known when it starts and before the model is loaded.

    Attributes:
        model: the patched MODEL that is sampled.
        frames: where the images are in the sampler's latents.
        latent: the sampler's latent that the run starts from, in VAE space; zeros for an empty one.
        denoise_mask: (F, 1 or C, h, w) the host's inpainting mask, 1 where it samples, or None.
        resources: the object that `Correction.patch` returned for this MODEL; it outlives the run.
    """

    model: ModelPatcher
    frames: Frames
    latent: Tensor
    denoise_mask: Tensor | None
    resources: Any = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return the shape (F, C, h, w) of all images of the run."""
        return self.frames.image_shape

    def require_images(self, method: str) -> None:
        """Check that the run samples single images.

        Raises:
            ValueError: it samples a video.
        """
        if self.frames.count > 1:
            raise ValueError(
                f"{method} works on single images, and this run samples a video of {self.frames.count} "
                "latent frames. Remove the node from this MODEL."
            )


@dataclass(frozen=True, kw_only=True)
class Step:
    """One model evaluation, with all tensors in the model's latent space.

    A batch of B images has F = B images; a batch of B videos has the F = B T latent frames of all of them.

    Attributes:
        x: (F, C, h, w) noisy latent.
        latent: the noisy latent as the sampler holds it, (B, C, h, w) or (B, C, T, h, w).
        frames: where the images are in it.
        timestep: (B,) the noise level as the host passes it on.
        sigma: the sampler's noise level.
        level: the noise level as a forward process.
        denoised: (F, C, h, w) the guider's prediction, not corrected.
        predictions: denoised predictions by name: the guider's own branches COND and UNCOND if it evaluated
            them, and in `correct` the predictions asked for. These equal `denoised` in samples that were not
            evaluated.
        guider: the host's guider; its `conds` are the run's conditioning.
        model_options: the host's options of this evaluation, as its `calc_cond_batch` takes them.
        cond_scale: the guider's CFG scale.
        denoise_mask: (F, 1 or C, h, w) the host's inpainting mask or None.
        is_new: False when the solver visits a noise level again, so that state must not advance.
    """

    x: Tensor
    latent: Tensor
    frames: Frames
    timestep: Tensor
    sigma: float
    level: NoiseLevel
    denoised: Tensor
    predictions: Mapping[str, Tensor]
    guider: Any
    model_options: dict[str, Any]
    cond_scale: float
    denoise_mask: Tensor | None
    is_new: bool

    @property
    def every_row(self) -> Tensor:
        """Return a (F,) bool mask of all images."""
        return torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)


class Correction:
    """A guidance method as the engine calls it.

    A correction holds settings only, because one object serves many models and runs. The rest is kept
    elsewhere:

    - *resources* belong to one patched MODEL: a decoder, a cache. `patch` returns them, they live as long as
      this MODEL, and every run finds them in `RunContext.resources`.
    - *state* belongs to one sampling run. `begin` makes it, every later hook gets it, and it ends with the
      run.

    At each evaluation the engine calls the hooks of all active corrections in this order: `steer`, `observe`,
    `wanted_texts`, `correct`, `finish`. Only `steer` and `correct` change the image. `wanted_texts` changes
    nothing at all.
    """

    name: str = "correction"
    """The method's name in traces and messages; empty for a correction that only records."""

    texts: dict[str, list[Any]] = {}
    """CONDITIONING by name. `wanted_texts` may ask for predictions of these."""

    compared_with: str = UNCOND
    """COND or UNCOND: the branch whose ControlNet, images, sizes, hooks and regions the texts share."""

    found: str = ""
    """A sentence for the node's message on the settings that were not set by hand; empty if all were."""

    two_pass: bool = False
    """True to sample every run twice. In the first pass only `observe` of this correction is called."""

    def patch(self, model: ModelPatcher) -> Any:
        """Add hooks to the clone of the model that `attach` makes, and return its resources or None."""
        return None

    def begin(self, context: RunContext) -> Any:
        """Return the state of a new run. May load other models; the sampled one is not loaded yet."""
        return None

    def resume_data(self, state: Any) -> Any:
        """Return the data for a run that continues where this one stopped (KSampler Advanced), or None."""
        return None

    def resume(self, state: Any, data: Any) -> None:
        """Continue from the `resume_data` of the previous run, not None. Called right after `begin`."""

    def continues(self, other: Correction) -> bool:
        """Return True for the same method with equal settings and texts, whose resume data it continues."""
        return self is other or (type(self) is type(other) and _same_value(vars(self), vars(other)))

    def remarks(self, state: Any) -> Sequence[str]:
        """Return sentences for the node's message: settings that do not fit, or what kept it from acting."""
        return ()

    def is_active(self, level: NoiseLevel) -> bool:
        """Return True if the method may act at a noise level. If not, no hook below is called."""
        raise NotImplementedError

    def steer(self, step: Step, state: Any) -> Tensor | None:
        """Change the run's conditioning (`step.guider.conds`).

        Returns:
            (B,) bool, the samples whose prediction must be made again; None for no sample. A video is one
            sample.
        """
        return None

    def observe(self, step: Step, state: Any) -> None:
        """Read the predictions and the attention of this step, update the state and decide what to do."""

    def wanted_texts(self, step: Step, state: Any) -> Mapping[str, Tensor]:
        """Return the predictions that `correct` needs, without changing anything.

        Returns:
            By name of `texts`, COND or UNCOND, the images (F,) bool that need it.
        """
        return {}

    def correct(self, step: Step, state: Any) -> Change | None:
        """Return the change of the denoised prediction at this step, or None for no change."""
        raise NotImplementedError

    def finish(self, step: Step, state: Any) -> None:
        """Restore what `steer` changed for this evaluation alone. Called in the reverse order of `steer`."""

    def end_first_pass(self, state: Any) -> Tensor | None:
        """Decide from what the first pass has shown; the second pass continues with the same state.

        Returns:
            (F, 1, h, w) bool, where the second pass may change the image; None for nowhere.
        """
        return None


@dataclass(frozen=True)
class Attachment:
    """A correction on a patched MODEL, kept in the options of that MODEL and of its clones.

    Attributes:
        correction: the method's settings and hooks.
        node: id of the node that attached it, where messages to its user appear; None outside a prompt.
        resources: the object that `Correction.patch` returned.
    """

    correction: Correction
    node: str | None
    resources: Any


def _same_value(a: Any, b: Any) -> bool:
    """Return True for the same object, and for equal numbers, texts, tensors and collections of these."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same_value(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same_value(x, y) for x, y in zip(a, b))
    if is_dataclass(a):
        return all(_same_value(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return isinstance(a, str | int | float) and a == b
