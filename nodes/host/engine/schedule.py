"""Noise levels of the host's samplers, and the position of a run in its schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ....guidance.core.noise_level import NoiseLevel


def noise_level(model_sampling: Any, sigma: Tensor) -> NoiseLevel:
    """Return the forward process at a sampler's sigma, measured from the host's own way of adding noise."""
    one, zero = torch.ones(1, 1, device=sigma.device), torch.zeros(1, 1, device=sigma.device)
    sigma = sigma[:1].float()
    signal = model_sampling.noise_scaling(sigma, zero, one)
    noise = model_sampling.noise_scaling(sigma, one, zero)
    return NoiseLevel(signal.item(), noise.item())


class SchedulePosition:
    """Position of the last evaluation in the schedule, which may rise (un-sampling) or do both."""

    SAME = 1e-4
    """Relative tolerance between the noise level of an evaluation and that of the schedule."""

    def __init__(self) -> None:
        self._schedule: Tensor | None = None
        self._levels: list[float] = []
        self._index = 0

    def rises(self, sigma: float, schedule: Tensor | None) -> bool:
        """Return True if the sampler goes to a higher noise level after an evaluation at `sigma`.

        Args:
            sigma: noise level of the evaluation; one between two levels belongs to the step before it.
            schedule: (steps + 1,) the noise levels of the run; None if the host does not tell.
        """
        if schedule is None:
            return False
        if schedule is not self._schedule:
            self._schedule, self._levels, self._index = schedule, schedule.tolist(), 0
        here = range(self._index, len(self._levels) - 1)
        self._index = next(
            (i for i in here if math.isclose(self._levels[i], sigma, rel_tol=self.SAME)), self._index
        )
        step = self._levels[self._index : self._index + 2]
        return len(step) == 2 and step[1] > step[0]
