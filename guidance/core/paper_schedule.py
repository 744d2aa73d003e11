"""The papers' step indices as noise levels.

The papers count 50 steps on Stable Diffusion 1.x's schedule: DDIM or PNDM with "leading" spacing and an
offset of one, so that step i has timestep 981 - 20 i. Expressed as noise levels, the same rule holds for
every sampler, every number of steps and every start of img2img.
"""

from __future__ import annotations

import math

import torch

TIMESTEPS = 1000
STEPS = 50


def timestep_of_step(step: float) -> float:
    """Return the timestep of a step of 50: 981 for step 0, 20 less for each further one."""
    return TIMESTEPS - TIMESTEPS // STEPS * (step + 1) + 1


def _log_sigmas() -> list[float]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64).square()
    signal = (1 - betas).cumprod(0)
    return ((1 - signal) / signal).sqrt().log().tolist()


_LOG_SIGMAS = _log_sigmas()


def sigma_of_timestep(timestep: float) -> float:
    """Return the noise-to-signal ratio of Stable Diffusion 1.x and SDXL at a timestep, log-linear in between.

    Raises:
        ValueError: the timestep is outside the schedule.
    """
    if not 0 <= timestep <= TIMESTEPS - 1:
        raise ValueError(f"Timestep {timestep:g} is not on the schedule. Take one from 0 to {TIMESTEPS - 1}.")
    low = min(int(timestep), TIMESTEPS - 2)
    share = timestep - low
    return math.exp((1 - share) * _LOG_SIGMAS[low] + share * _LOG_SIGMAS[low + 1])


def sigma_of_step(step: float) -> float:
    """Return the noise level of a step of 50."""
    return sigma_of_timestep(timestep_of_step(step))
