"""Resumed runs: state of methods between the runs in which KSampler Advanced samples one image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .traces import fingerprint
from .two_pass import FirstPassEnd

KEPT = 8
"""Unfinished images that a model remembers."""


@dataclass(frozen=True)
class ResumePoint:
    """State of an unfinished image.

    Attributes:
        data: the `Correction.resume_data` of every correction.
        first_pass: the end of the run's first pass; None when the run had one pass.
    """

    data: tuple[Any, ...]
    first_pass: FirstPassEnd | None


class ResumeStore:
    """Resume points of a MODEL's runs that stopped before the noise was gone.

    A run resumes another one if it starts from exactly the latents that came out, at the noise level at which
    that run stopped, and adds no noise of its own. Image-to-image from a finished image is a new run.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, ResumePoint] = OrderedDict()

    def keep(
        self, samples: Tensor, sigmas: Tensor, data: Sequence[Any], first_pass: FirstPassEnd | None
    ) -> None:
        """Remember the end of a run, unless it ended without noise or has nothing to continue from."""
        is_finished = not float(sigmas[-1])
        has_nothing = first_pass is None and all(value is None for value in data)
        if is_finished or has_nothing:
            return
        self._kept[_key(samples, sigmas[-1])] = ResumePoint(tuple(data), first_pass)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def find(self, noise: Tensor, latent: Tensor, sigmas: Tensor) -> ResumePoint | None:
        """Return the resume point that a run with these inputs continues from, or None for a new run."""
        if not self._kept or bool(torch.count_nonzero(noise)):
            return None
        return self._kept.get(_key(latent, sigmas[0]))


def _key(samples: Tensor, sigma: Tensor) -> str:
    return f"{float(sigma):.6g} {fingerprint(samples)}"
