"""Momentum of guidance over the steps of a run, shared by Safe Latent Diffusion and Semantic Guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.correction import Correction, RunContext


@dataclass
class Momentum:
    """State of a run: its accumulated guidance (B, C, h, w), or None before the first step."""

    value: Tensor | None = None

    def or_zeros(self, like: Tensor) -> Tensor:
        """Return the momentum, or zeros of the shape of `like` before the first step."""
        return torch.zeros_like(like) if self.value is None else self.value


class MomentumCorrection(Correction):
    """Base of corrections whose only state is a momentum, which a resumed run continues with."""

    def begin(self, context: RunContext) -> Momentum:
        """Return the state of a run that starts without momentum."""
        return Momentum()

    def resume_data(self, state: Momentum) -> Tensor | None:
        """Return the momentum."""
        return state.value

    def resume(self, state: Momentum, data: Tensor) -> None:
        """Continue with the momentum of the previous run."""
        state.value = data
