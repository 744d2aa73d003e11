"""Safe Text Embedding Guidance as a correction: it steers the run's own text embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...guidance.composition import per_sample
from ...guidance.noise_level import NoiseLevel
from ...guidance.safe_text_guidance import SafeTextGuidanceSettings, acts_at, guided_embedding
from ...guidance.safety_function import SafetyFunction
from .decoders import Decoder, DecoderName, assess, auxiliary_patcher, make_decoder, prediction_gradient
from .gradients import embeddings, in_parts, reserve_memory, set_embeddings, text_gradients
from .runs import KEY, Correction, Evaluation, RunContext, Step


@dataclass
class TextGuidanceState:
    """State of one run: how many steps of the window were seen, the prompt's embeddings, and the inpainted picture."""

    kept: Tensor | None
    """What inpainting keeps, in the model's latent space."""
    steps: int = 0
    initial: list[Tensor | None] | None = None


class SafeTextGuidanceCorrection(Correction):
    """Looks at every prediction without a graph; differentiates only for pictures that the safety function objects to."""

    name = "STG"

    def __init__(
        self,
        vae: Any,
        function: SafetyFunction,
        settings: SafeTextGuidanceSettings,
        decoder: DecoderName = "vae",
        checkpointed: bool = False,
    ) -> None:
        self.vae, self.function, self.settings, self.checkpointed = vae, function, settings, checkpointed
        self.decoder_name = decoder
        self._decoder: Decoder | None = None

    def patch(self, model: ModelPatcher) -> None:
        self._decoder = make_decoder(self.decoder_name, model, self.vae)
        load_along(model, self._decoder, self.function)

    def begin(self, context: RunContext) -> TextGuidanceState:
        require_pictures(context, self.name)
        return TextGuidanceState(kept_latent(context))

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.rho != 0 and self.settings.gamma != 0 and level in self.settings.window

    def steer(self, step: Step, state: TextGuidanceState, evaluation: Evaluation) -> Tensor | None:
        if not step.is_new or self._decoder is None:
            return None
        state.steps += 1
        if not acts_at(state.steps - 1, self.settings.gamma):
            return None
        shown = inpainted(step.denoised, step.denoise_mask, state.kept)
        found = assess(self._decoder, self.function, shown)
        hit = (found.gate & (found.score > self.settings.tau)).to(step.x.device)
        rows = hit.nonzero()[:, 0]
        if not len(rows):
            return None
        current = embeddings(evaluation)
        state.initial = state.initial or current
        gradients = in_parts(rows, lambda some, short: self._gradients(step, shown, evaluation, current, some, short or self.checkpointed))
        moved = torch.zeros_like(hit)
        for index, gradient in enumerate(gradients):
            before, prompt = current[index], state.initial[index]
            if gradient is None or before is None or prompt is None:
                continue
            here = rows.to(before.device)
            new, usable = guided_embedding(before[here], prompt[here], gradient, found.score.to(before.device)[here], self.settings)
            current[index] = before.index_copy(0, here, new)
            moved[rows] |= usable.to(moved.device)
        set_embeddings(evaluation, current)
        return moved

    def _gradients(
        self, step: Step, shown: Tensor, evaluation: Evaluation, current: list[Tensor | None], rows: Tensor, checkpointed: bool
    ) -> list[Tensor | None]:
        """Gradients of the unsafe score with respect to the embeddings, by the chain rule, one network at a time."""
        assert self._decoder is not None
        wanted = prediction_gradient(self._decoder, self.function, shown[rows]).to(step.x.device)
        wanted = wanted * step.cond_scale
        if step.denoise_mask is not None:
            wanted = wanted * step.denoise_mask.expand(len(shown), -1, -1, -1)[rows]
        # Half-precision networks lose small numbers; the gradient is linear in this one, so its size is put back afterwards.
        size = wanted.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        found = text_gradients(evaluation, current, wanted / per_sample(size, wanted), rows, checkpointed)
        return [None if g is None else g.float() * per_sample(size, g).to(g.device) for g in found]

    def correct(self, step: Step, state: TextGuidanceState) -> None:
        return None


def load_along(model: ModelPatcher, decoder: Decoder, function: SafetyFunction) -> None:
    """Have the host load the decoder and the detectors whenever it loads the model, and leave memory for gradients."""
    ours = [*decoder.patchers, *(auxiliary_patcher(network) for network in function.networks)]
    model.set_additional_models(KEY, [*model.get_additional_models_with_key(KEY), *ours])
    reserve_memory(model)


def require_pictures(context: RunContext, method: str) -> None:
    """Raise ValueError for models that sample something else than pictures."""
    if len(context.latent_shape) != 4:
        raise ValueError(f"{method} looks at single pictures, and this model samples video or audio. Remove the node from this MODEL.")


def kept_latent(context: RunContext) -> Tensor | None:
    """What inpainting keeps, in the model's latent space."""
    if context.denoise_mask is None:
        return None
    latent_format = context.model.get_model_object("latent_format")
    return latent_format.process_in(context.latent.float()) if bool(context.latent.any()) else context.latent.float()


def inpainted(denoised: Tensor, mask: Tensor | None, kept: Tensor | None) -> Tensor:
    """The prediction with what inpainting keeps in place, so that pre-existing content neither hides nor is pulled."""
    if mask is None or kept is None:
        return denoised
    mask = mask.to(denoised.dtype)
    return mask * denoised + (1 - mask) * kept.to(denoised)
