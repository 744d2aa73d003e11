"""Safe Text Embedding Guidance as a correction: it steers the run's own text embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....guidance.core.composition import per_sample
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.safe_text_guidance import SafeTextGuidanceSettings, acts_at, guided_embedding
from ....guidance.safety_functions.interface import SafetyFunction
from ..autograd.decoders import DecoderName
from ..autograd.gradients import embeddings, in_parts, set_embeddings, text_gradients
from ..engine.correction import Evaluation, RunContext, Step
from .detector_correction import DetectorCorrection, Sight, kept_latent, largest_entry, require_images


@dataclass
class TextGuidanceState:
    """State of one run: how many steps of the window were seen, the prompt's embeddings, and the inpainted image."""

    kept: Tensor | None
    """What inpainting keeps, in the model's latent space."""
    steps: int = 0
    initial: list[Tensor | None] | None = None


class SafeTextGuidanceCorrection(DetectorCorrection):
    """Moves the text embeddings of images that the safety function objects to, and has their predictions made anew."""

    name = "STG"

    def __init__(
        self,
        vae: Any,
        function: SafetyFunction,
        settings: SafeTextGuidanceSettings,
        decoder: DecoderName = "vae",
        checkpointed: bool = False,
    ) -> None:
        super().__init__(vae, function, settings.tau, decoder, checkpointed)
        self.settings = settings

    def begin(self, context: RunContext) -> TextGuidanceState:
        require_images(context, self.name)
        return TextGuidanceState(kept_latent(context))

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.rho != 0 and self.settings.gamma != 0 and level in self.settings.window

    def steer(self, step: Step, state: TextGuidanceState, evaluation: Evaluation) -> Tensor | None:
        if not step.is_new:
            return None
        state.steps += 1
        if not acts_at(state.steps - 1, self.settings.gamma):
            return None
        sight = self.look(step, state.kept)
        rows = sight.rows
        if not len(rows):
            return None
        current = embeddings(evaluation)
        state.initial = state.initial or current
        gradients = in_parts(
            rows,
            lambda some, short: self._gradients(
                step, sight, evaluation, current, some, short or self.checkpointed
            ),
        )
        moved = torch.zeros_like(sight.hit)
        for index, gradient in enumerate(gradients):
            before, prompt = current[index], state.initial[index]
            if gradient is None or before is None or prompt is None:
                continue
            here = rows.to(before.device)
            new, usable = guided_embedding(
                before[here], prompt[here], gradient, sight.score.to(before.device)[here], self.settings
            )
            current[index] = before.index_copy(0, here, new)
            moved[rows] |= usable.to(moved.device)
        set_embeddings(evaluation, current)
        return moved

    def _gradients(
        self,
        step: Step,
        sight: Sight,
        evaluation: Evaluation,
        current: list[Tensor | None],
        rows: Tensor,
        checkpointed: bool,
    ) -> list[Tensor | None]:
        """Gradients of the unsafe score with respect to the embeddings, by the chain rule, one network at a time."""
        wanted = self.score_gradient(step, sight, rows) * step.cond_scale
        size = largest_entry(wanted)
        found = text_gradients(evaluation, current, wanted / per_sample(size, wanted), rows, checkpointed)
        return [None if g is None else g.float() * per_sample(size, g).to(g.device) for g in found]

    def correct(self, step: Step, state: TextGuidanceState) -> None:
        return None
