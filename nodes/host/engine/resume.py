"""Resumed runs: state of methods between the runs in which KSampler Advanced samples one image.

Every part may have nodes of its own. A method continues where the same method with equal settings and texts
stopped, whichever node attached it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .correction import Correction
from .traces import fingerprint
from .two_pass import FirstPassEnd

KEPT = 8
"""Unfinished images that a model remembers."""


@dataclass(frozen=True)
class ResumePoint:
    """State of an unfinished image.

    Attributes:
        corrections: the corrections of the run that stopped there.
        data: the `Correction.resume_data` of each of them.
        first_pass: the end of the run's first pass; None when the run had one pass.
    """

    corrections: tuple[Correction, ...]
    data: tuple[Any, ...]
    first_pass: FirstPassEnd | None

    def data_for(self, corrections: Sequence[Correction]) -> list[Any]:
        """Return the data that each correction continues from; None for one that was not there."""
        left = list(zip(self.corrections, self.data))
        found = []
        for correction in corrections:
            index = next((i for i, (other, _) in enumerate(left) if correction.continues(other)), None)
            found.append(None if index is None else left.pop(index)[1])
        return found

    def first_pass_for(self, corrections: Sequence[Correction]) -> FirstPassEnd | None:
        """Return the first pass that these corrections continue; None if others decided what it showed."""
        now = [correction for correction in corrections if correction.two_pass]
        then = [correction for correction in self.corrections if correction.two_pass]
        is_same = len(now) == len(then) and all(a.continues(b) for a, b in zip(now, then))
        return self.first_pass if is_same else None


class ResumeStore:
    """Resume points of the runs of one checkpoint that stopped before the noise was gone.

    A run resumes another one if it starts from exactly the latents that came out, at the noise level at which
    that run stopped, and adds no noise of its own. Image-to-image from a finished image is a new run.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, ResumePoint] = OrderedDict()

    def keep(self, samples: Tensor, sigmas: Tensor, point: ResumePoint) -> None:
        """Remember the end of a run, unless it ended without noise or has nothing to continue from."""
        is_finished = not float(sigmas[-1])
        has_nothing = point.first_pass is None and all(value is None for value in point.data)
        if is_finished or has_nothing:
            return
        self._kept[_key(samples, sigmas[-1])] = point
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def find(self, noise: Tensor, latent: Tensor, sigmas: Tensor) -> ResumePoint | None:
        """Return the resume point that a run with these inputs continues from, or None for a new run."""
        if not self._kept or bool(torch.count_nonzero(noise)):
            return None
        return self._kept.get(_key(latent, sigmas[0]))


_stores: WeakKeyDictionary[Any, ResumeStore] = WeakKeyDictionary()


def store_of(model: ModelPatcher) -> ResumeStore:
    """Return the resume points of a MODEL's checkpoint, which all its clones share."""
    return _stores.setdefault(model.model, ResumeStore())


def _key(samples: Tensor, sigma: Tensor) -> str:
    return f"{float(sigma):.6g} {fingerprint(samples)}"
