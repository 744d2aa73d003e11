"""What corrections that follow a safety function share: the decoder, the look at the prediction, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.safety_functions.interface import SafetyFunction
from ..autograd.auxiliary_models import auxiliary_patcher
from ..autograd.decoders import Decoder, DecoderName, make_decoder
from ..autograd.gradients import reserve_memory
from ..autograd.prediction_scores import assess, prediction_gradient
from ..engine.correction import KEY, Correction, RunContext, Step


@dataclass(frozen=True)
class Sight:
    """What a safety function saw in a step's predictions."""

    shown: Tensor
    """(B, C, h, w), the predictions with what inpainting keeps in place."""
    score: Tensor
    """(B,), the unsafe scores."""
    hit: Tensor
    """(B,) bool on the sampler's device: images that the function objects to."""

    @property
    def rows(self) -> Tensor:
        """(R,), the indices of the hits."""
        return self.hit.nonzero()[:, 0]


class DetectorCorrection(Correction):
    """Looks at every prediction without a graph; differentiates only for images that the safety function objects to."""

    def __init__(
        self,
        vae: Any,
        function: SafetyFunction,
        tau: float,
        decoder: DecoderName = "vae",
        checkpointed: bool = False,
    ) -> None:
        self.vae, self.function, self.tau, self.checkpointed = vae, function, tau, checkpointed
        self.decoder_name = decoder
        self._decoder: Decoder | None = None

    @property
    def decoder(self) -> Decoder:
        """The decoder for the model that this is attached to."""
        assert self._decoder is not None, "attached by `attach`, which calls `patch`"
        return self._decoder

    def patch(self, model: ModelPatcher) -> None:
        self._decoder = make_decoder(self.decoder_name, model, self.vae)
        load_along(model, self._decoder, self.function)

    def look(self, step: Step, kept: Tensor | None) -> Sight:
        """The safety function's verdict on the step's predictions; `kept` is what inpainting keeps."""
        shown = inpainted(step.denoised, step.denoise_mask, kept)
        found = assess(self.decoder, self.function, shown)
        return Sight(shown, found.score, (found.gate & (found.score > self.tau)).to(step.x.device))

    def score_gradient(self, step: Step, sight: Sight, rows: Tensor) -> Tensor:
        """Gradient (R, C, h, w) of the unsafe score with respect to the predictions of these rows, where the sampler may paint."""
        gradient = prediction_gradient(self.decoder, self.function, sight.shown[rows]).to(step.x.device)
        if step.denoise_mask is not None:
            gradient = gradient * step.denoise_mask.expand(len(sight.shown), -1, -1, -1)[rows]
        return gradient


def largest_entry(x: Tensor) -> Tensor:
    """(B,), the largest magnitude in each sample, above zero.

    Half-precision networks lose small numbers; their gradients are linear in what enters, so it enters at this scale.
    """
    return x.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)


def load_along(model: ModelPatcher, decoder: Decoder, function: SafetyFunction) -> None:
    """Have the host load the decoder and the detectors whenever it loads the model, and leave memory for gradients."""
    ours = [*decoder.patchers, *(auxiliary_patcher(network) for network in function.networks)]
    model.set_additional_models(KEY, [*model.get_additional_models_with_key(KEY), *ours])
    reserve_memory(model)


def require_images(context: RunContext, method: str) -> None:
    """Raise ValueError for models that sample something else than images."""
    if len(context.latent_shape) != 4:
        raise ValueError(
            f"{method} looks at single images, and this model samples video or audio. Remove the node from this MODEL."
        )


def kept_latent(context: RunContext) -> Tensor | None:
    """What inpainting keeps, in the model's latent space."""
    if context.denoise_mask is None:
        return None
    latent_format = context.model.get_model_object("latent_format")
    return (
        latent_format.process_in(context.latent.float())
        if bool(context.latent.any())
        else context.latent.float()
    )


def inpainted(denoised: Tensor, mask: Tensor | None, kept: Tensor | None) -> Tensor:
    """The prediction with what inpainting keeps in place, so that pre-existing content neither hides nor is pulled."""
    if mask is None or kept is None:
        return denoised
    mask = mask.to(denoised.dtype)
    return mask * denoised + (1 - mask) * kept.to(denoised)
