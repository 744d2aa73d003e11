"""Safe Text Embedding Guidance as a correction: it steers the run's own text embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....guidance.core.composition import per_sample
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.safe_text_guidance import SafeTextGuidanceSettings, acts_at, guided_embedding
from ....guidance.safety_functions.interface import SafetyFunction
from ..autograd.conditioning_entries import embeddings, set_embeddings
from ..autograd.decoders import DecoderName
from ..autograd.gradients import in_parts, text_gradients
from ..engine.correction import RunContext, Step
from .detector_correction import DetectorCorrection, DetectorState, Verdict, kept_latent, largest_entry


@dataclass
class TextGuidanceState(DetectorState):
    """State of one run.

    Attributes:
        steps: number of steps seen inside the window.
        initial: embeddings of the prompt itself, one per positive entry; None before the first guided step.
        moved: embeddings before and after the move of this evaluation, one pair per positive entry, if it is
            to be undone.
    """

    steps: int = 0
    initial: list[Tensor | None] | None = None
    moved: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)


class SafeTextGuidanceCorrection(DetectorCorrection):
    """Guidance of the text embeddings of unsafe images, whose predictions are then made again."""

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
        context.require_images(self.name)
        return TextGuidanceState(context.resources, kept_latent(context))

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.rho != 0 and self.settings.gamma != 0 and level in self.settings.window

    def steer(self, step: Step, state: TextGuidanceState) -> Tensor | None:
        # An accumulated embedding moves once per noise level; a move that is undone serves one evaluation.
        if not step.is_new and self.settings.accumulate:
            return None
        state.steps += step.is_new
        if not acts_at(state.steps - 1, self.settings.gamma):
            return None
        verdict = self.assess(step, state)
        indices = verdict.indices
        if not len(indices):
            return None
        current = embeddings(step)
        if state.initial is None or not self.settings.accumulate:
            state.initial = list(current)

        def gradients_of(some: Tensor, is_short_of_memory: bool) -> list[Tensor | None]:
            checkpointed = is_short_of_memory or self.checkpointed
            return self._gradients(step, state, verdict, current, some, checkpointed)

        moved = torch.zeros_like(verdict.is_unsafe)
        for index, gradient in enumerate(in_parts(indices, gradients_of)):
            before, prompt = current[index], state.initial[index]
            if gradient is None or before is None or prompt is None:
                continue
            here = indices.to(before.device)
            score = verdict.score.to(before.device)[here]
            new, usable = guided_embedding(before[here], prompt[here], gradient, score, self.settings)
            current[index] = before.index_copy(0, here, new)
            moved[indices] |= usable.to(moved.device)
        set_embeddings(step, current)
        if not self.settings.accumulate:
            state.moved = list(zip(state.initial, current))
        return moved

    def finish(self, step: Step, state: TextGuidanceState) -> None:
        if state.moved:
            set_embeddings(step, [_undone(*move) for move in zip(embeddings(step), state.moved)])
            state.moved = []

    def _gradients(
        self,
        step: Step,
        state: DetectorState,
        verdict: Verdict,
        current: list[Tensor | None],
        indices: Tensor,
        checkpointed: bool,
    ) -> list[Tensor | None]:
        """Return the gradients of the unsafe score with respect to the embeddings, (R, tokens, width) each.

        They follow the chain rule, through one network at a time.
        """
        wanted = self.score_gradient(step, state, verdict, indices) * step.cond_scale
        size = largest_entry(wanted)
        found = text_gradients(step, current, wanted / per_sample(size, wanted), indices, checkpointed)
        return [None if g is None else g.float() * per_sample(size, g).to(g.device) for g in found]

    def correct(self, step: Step, state: TextGuidanceState) -> None:
        return None


def _undone(now: Tensor | None, move: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """Return an embedding without one move; bit-identical to that before it unless others moved it too."""
    before, after = move
    if now is None or before is None or after is None:
        return None
    return torch.where(now == after, before, now - (after - before))
