"""A run before the run, for methods that want to see the image before they change it.

It starts from the same noise and follows the same texts, and those methods only watch. The run itself then keeps the
rehearsal's predictions wherever they do not act: whatever the model makes of their change, the rest stays as it was.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import comfy.utils
import torch
from torch import Tensor

log = logging.getLogger(__name__)
Callback = Callable[[int, Any, Any, int], None]


class Rehearsal:
    """What a rehearsal leaves to the run: what the methods saw, and the prediction of every model call."""

    def __init__(self) -> None:
        self._predictions: deque[tuple[float, Tensor]] = deque()
        self.region: Tensor | None = None
        """(B, 1, h, w) bool, where the run may differ; None while the rehearsal lasts."""
        self.states: Mapping[int, Any] = {}
        """The states of the methods that watched, by their index."""

    @property
    def is_over(self) -> bool:
        """Whether the run itself has begun."""
        return self.region is not None

    def end(self, region: Tensor, states: Mapping[int, Any]) -> None:
        """Begin the run itself, which may differ in `region` and nowhere else."""
        self.region, self.states = region, states

    def settled(self, sigma: float, denoised: Tensor) -> Tensor:
        """The prediction of one model call: noted in the rehearsal; in the run, the rehearsal's outside the region."""
        if self.region is None:
            self._predictions.append((sigma, denoised))
            return denoised
        if self._predictions and self._predictions[0][0] == sigma:
            return torch.where(self.region, denoised, self._predictions.popleft()[1])
        if self._predictions:
            log.warning(
                "This sampler chooses its steps as it goes, so the rest of the image cannot be kept. Use another one."
            )
            self._predictions.clear()
        return denoised


class Unseen:
    """Stands in for the host's callback during a rehearsal: progress, but no preview of what is being avoided."""

    def __init__(self, callback: Callback | None) -> None:
        self._callback = callback
        self._last: tuple[int, Any, Any, int] | None = None

    def __call__(self, step: int, x0: Any, x: Any, steps: int) -> None:
        comfy.utils.ProgressBar(steps).update_absolute(step + 1)
        self._last = (step, x0, x, steps)

    def show(self) -> None:
        """Give the host the last step after all: nothing was found, so the rehearsal is the run."""
        if self._callback is not None and self._last is not None:
            self._callback(*self._last)
