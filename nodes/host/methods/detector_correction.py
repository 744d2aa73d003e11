"""Base of corrections with a safety function: decoder, assessment of predictions, gradient of the score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.safety_functions.interface import SafetyFunction
from ..autograd.auxiliary_models import load_along
from ..autograd.decoders import Decoder, DecoderName, make_decoder
from ..autograd.prediction_scores import assess, prediction_gradient
from ..engine.correction import Correction, RunContext, Step


@dataclass
class DetectorState:
    """State of one run.

    Attributes:
        decoder: the patched MODEL's decoder from latents to images.
        kept: (B, C, h, w) latent that inpainting keeps, in the model's latent space; None without inpainting.
    """

    decoder: Decoder
    kept: Tensor | None


@dataclass(frozen=True)
class Verdict:
    """Assessment of a step's predictions by a safety function.

    Attributes:
        latents: (B, C, h, w) the assessed predictions, with the inpainted image's kept part in place.
        score: (B,) unsafe scores.
        is_unsafe: (B,) bool on the sampler's device.
    """

    latents: Tensor
    score: Tensor
    is_unsafe: Tensor

    @property
    def indices(self) -> Tensor:
        """Return the indices of the unsafe images, (R,)."""
        return self.is_unsafe.nonzero()[:, 0]


class DetectorCorrection(Correction):
    """Base of corrections that assess every prediction, and differentiate only the unsafe ones.

    Args:
        vae: the host's VAE of the model.
        function: the safety function.
        tau: measure above which an image is unsafe, if the function's gate is open for it.
        decoder: decoder between latents and the images that the function sees.
        checkpointed: save memory in gradient passes at the price of time.
    """

    def __init__(
        self,
        vae: Any,
        function: SafetyFunction,
        tau: float,
        decoder: DecoderName = "vae",
        checkpointed: bool = False,
    ) -> None:
        self.vae, self.function, self.tau = vae, function, tau
        self.decoder_name, self.checkpointed = decoder, checkpointed

    def patch(self, model: ModelPatcher) -> Decoder:
        decoder = make_decoder(self.decoder_name, model, self.vae)
        load_along(model, decoder.patchers, self.function)
        return decoder

    def begin(self, context: RunContext) -> DetectorState:
        context.require_images(self.name)
        return DetectorState(context.resources, kept_latent(context))

    def assess(self, step: Step, state: DetectorState) -> Verdict:
        """Return the safety function's verdict on the step's predictions, computed without a graph."""
        latents = inpainted(step.denoised, step.denoise_mask, state.kept)
        found = assess(state.decoder, self.function, latents)
        is_unsafe = found.gate & (found.level > self.tau)
        return Verdict(latents, found.score, is_unsafe.to(step.x.device))

    def score_gradient(self, step: Step, state: DetectorState, verdict: Verdict, indices: Tensor) -> Tensor:
        """Return the gradient of the unsafe score with respect to some predictions, (R, C, h, w).

        It is zero where inpainting keeps the image.
        """
        gradient = prediction_gradient(state.decoder, self.function, verdict.latents[indices]).to(
            step.x.device
        )
        if step.denoise_mask is not None:
            gradient = gradient * step.denoise_mask.expand(len(verdict.latents), -1, -1, -1)[indices]
        return gradient


def largest_entry(x: Tensor) -> Tensor:
    """Return the largest magnitude in each sample, (B,), above zero.

    Half-precision networks lose small numbers. Their gradients are linear in the vector that enters, so
    callers divide by this value before a gradient pass and multiply by it afterwards.
    """
    return x.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)


def kept_latent(context: RunContext) -> Tensor | None:
    """Return the latent that inpainting keeps, in the model's latent space; None without inpainting."""
    if context.denoise_mask is None:
        return None
    latent = context.latent.float()
    if not bool(context.latent.any()):
        return context.frames.images(latent)
    kept = context.frames.images(context.model.get_model_object("latent_format").process_in(latent))
    return kept


def inpainted(denoised: Tensor, mask: Tensor | None, kept: Tensor | None) -> Tensor:
    """Return the prediction with the kept part of an inpainted image in place, (B, C, h, w).

    The safety function sees the image as inpainting will finish it, without the part that inpainting
    discards.
    """
    if mask is None or kept is None:
        return denoised
    mask = mask.to(denoised.dtype)
    return mask * denoised + (1 - mask) * kept.to(denoised)
