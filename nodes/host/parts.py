"""A picture sampled in parts, as KSampler Advanced and split sigmas do: what a part leaves to the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .traces import fingerprint

KEPT = 8
"""Unfinished pictures that a model remembers."""


class Leftovers:
    """What the corrections of a MODEL had come to in runs that stopped before the noise was gone.

    The next part is known by starting from the very latents that came out, at the noise level at which that run stopped, and
    by adding no noise of its own. Image-to-image from a finished picture is a run of its own, with nothing to go on from.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Any, ...]] = OrderedDict()

    def keep(self, samples: Tensor, sigmas: Tensor, carried: Sequence[Any]) -> None:
        """Remember what each correction carries, unless the run ended without noise or none carries anything."""
        if not float(sigmas[-1]) or all(value is None for value in carried):
            return
        self._kept[_key(samples, sigmas[-1])] = tuple(carried)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def find(self, noise: Tensor, latent: Tensor, sigmas: Tensor) -> tuple[Any, ...] | None:
        """What each correction carried out of the run that this one goes on from, or None."""
        if not self._kept or bool(torch.count_nonzero(noise)):
            return None
        return self._kept.get(_key(latent, sigmas[0]))


def _key(samples: Tensor, sigma: Tensor) -> str:
    return f"{float(sigma):.6g} {fingerprint(samples)}"
