"""Interface between the ways to compare predictions with a negation set and the correction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.noise_level import NoiseLevel
from ..core.references import References
from .settings import Anchor, SafeDenoiserResult, SafeDenoiserSettings

MoveReferences = Callable[[References, torch.device], References]
"""Moves references into a device's memory, or returns them as they are, to be streamed there."""


@dataclass(frozen=True)
class Predictions:
    """One model evaluation as the comparisons see it, all tensors in float32 or wider.

    Attributes:
        x: (B, C, h, w) noisy latent.
        denoised: (B, C, h, w) the guider's prediction, usually after CFG.
        unconditional: (B, C, h, w) the prediction without the prompt; `denoised` again when there is none.
        level: the noise level of x.
        mask: (1 or B, 1, h, w) in [0, 1], where to compare and to act, or None for everywhere.
        is_new: False when the solver visits a noise level again, so that the state of the run must not
            advance.
    """

    x: Tensor
    denoised: Tensor
    unconditional: Tensor
    level: NoiseLevel
    mask: Tensor | None = None
    is_new: bool = True

    def anchored(self, anchor: Anchor) -> Tensor:
        """Return the prediction that the settings say to compare, (B, C, h, w)."""
        return self.unconditional if anchor == "unconditional" else self.denoised


class Comparison(ABC):
    """One way of comparing predictions with a negation set, for one sampling run.

    It holds what it computed from the set, which further runs may reuse, and the state that one run advances.
    A run calls `place` once, before its first `correct`.
    """

    @abstractmethod
    def place(self, device: torch.device, move: MoveReferences, mask: Tensor | None) -> None:
        """Move the set to the sampler's device, and compute what depends on the first active step.

        Args:
            device: where predictions are.
            move: how references get there.
            mask: (1 or B, 1, h, w) in [0, 1] of the run, or None.
        """

    @abstractmethod
    def correct(self, predictions: Predictions) -> SafeDenoiserResult:
        """Return the change for one evaluation, and advance the state of the run when the step is new."""

    @abstractmethod
    def for_another_run(self) -> Comparison:
        """Return the same comparison without this run's state and without memory of the sampler's device."""

    def unconditional_rows(self, every_row: Tensor) -> Tensor | None:
        """Return the samples (B,) bool whose unconditional prediction `correct` needs, or None for none.

        Args:
            every_row: (B,) bool, all True.
        """
        return None

    def resume_data(self) -> Any:
        """Return the state with which another comparison can resume this run, or None for nothing."""
        return None

    def resume(self, data: Any) -> None:
        """Continue with the state that an earlier run's comparison returned from `resume_data`.

        Args:
            data: that state, never None.
        """
        raise NotImplementedError


class ReferenceComparison(Comparison):
    """Base of the ways that compare a prediction with whole reference latents. It has no state."""

    def __init__(self, references: References, settings: SafeDenoiserSettings) -> None:
        self.settings = settings
        self._stored = references
        self.references = references

    def place(self, device: torch.device, move: MoveReferences, mask: Tensor | None) -> None:
        self.references = move(self._stored, device)

    def for_another_run(self) -> Comparison:
        another = copy(self)
        another.references = self._stored
        return another

    def unconditional_rows(self, every_row: Tensor) -> Tensor | None:
        return every_row if self.settings.anchor == "unconditional" else None
