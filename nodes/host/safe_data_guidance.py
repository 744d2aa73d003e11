"""Safe Data Guidance as a correction: it moves the prediction against the gradient of the unsafe score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...guidance.composition import Change, per_sample
from ...guidance.noise_level import NoiseLevel
from ...guidance.safe_data_guidance import SafeDataGuidanceSettings, data_guidance, latent_gradient_from_prediction
from ...guidance.safety_function import SafetyFunction
from .decoders import Decoder, DecoderName, assess, make_decoder, prediction_gradient
from .gradients import in_parts, latent_gradient
from .runs import Correction, Evaluation, RunContext, Step
from .safe_text_guidance import inpainted, kept_latent, load_along, require_pictures


@dataclass
class DataGuidanceState:
    """What inpainting keeps, and between the two parts of a step the host's side of the evaluation."""

    kept: Tensor | None
    evaluation: Evaluation | None = None


class SafeDataGuidanceCorrection(Correction):
    """Looks at every prediction without a graph; differentiates only for pictures that the safety function objects to."""

    name = "SDG"

    def __init__(
        self,
        vae: Any,
        function: SafetyFunction,
        settings: SafeDataGuidanceSettings,
        decoder: DecoderName = "vae",
        checkpointed: bool = False,
    ) -> None:
        self.vae, self.function, self.settings, self.checkpointed = vae, function, settings, checkpointed
        self.decoder_name = decoder
        self._decoder: Decoder | None = None

    def patch(self, model: ModelPatcher) -> None:
        self._decoder = make_decoder(self.decoder_name, model, self.vae)
        load_along(model, self._decoder, self.function)

    def begin(self, context: RunContext) -> DataGuidanceState:
        require_pictures(context, self.name)
        return DataGuidanceState(kept_latent(context))

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def steer(self, step: Step, state: DataGuidanceState, evaluation: Evaluation) -> None:
        # The gradient belongs to the prediction after all steering, so it waits for `correct`.
        state.evaluation = evaluation

    def correct(self, step: Step, state: DataGuidanceState) -> Change | None:
        evaluation, state.evaluation = state.evaluation, None
        assert evaluation is not None and self._decoder is not None
        shown = inpainted(step.denoised, step.denoise_mask, state.kept)
        found = assess(self._decoder, self.function, shown)
        hit = (found.gate & (found.score > self.settings.tau)).to(step.x.device)
        rows = hit.nonzero()[:, 0]
        if not len(rows):
            return None
        (of_rows,) = in_parts(rows, lambda some, short: [self._gradient(step, shown, evaluation, some, short or self.checkpointed)])
        assert of_rows is not None
        gradient = torch.zeros_like(step.denoised, dtype=torch.float32).index_copy(0, rows, of_rows.to(step.denoised.device))
        delta, usable = data_guidance(step.denoised, gradient, step.level, self.settings)
        return Change(delta, hit & usable)

    def _gradient(self, step: Step, shown: Tensor, evaluation: Evaluation, rows: Tensor, checkpointed: bool) -> Tensor:
        assert self._decoder is not None
        wanted = prediction_gradient(self._decoder, self.function, shown[rows]).to(step.x.device)
        if step.denoise_mask is not None:
            wanted = wanted * step.denoise_mask.expand(len(shown), -1, -1, -1)[rows]
        if self.settings.cheap:
            return latent_gradient_from_prediction(wanted, step.level)
        size = wanted.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        return latent_gradient(evaluation, wanted / per_sample(size, wanted), rows, checkpointed).float() * per_sample(size, wanted)
