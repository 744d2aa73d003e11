"""An image sampled in parts, as KSampler Advanced and split sigmas do: what a part leaves to the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .traces import fingerprint

KEPT = 8
"""Unfinished images that a model remembers."""


@dataclass(frozen=True)
class Rehearsed:
    """Where the rehearsal of a part stopped: its latents, and (B, 1, h, w) bool, where the part itself may differ from them."""

    samples: Tensor
    region: Tensor


@dataclass(frozen=True)
class Leftover:
    """What a part leaves: what each correction carries, and its rehearsal, which goes on as well."""

    carried: tuple[Any, ...]
    rehearsed: Rehearsed | None


class Leftovers:
    """What the corrections of a MODEL had come to in runs that stopped before the noise was gone.

    The next part is known by starting from the very latents that came out, at the noise level at which that run stopped, and
    by adding no noise of its own. Image-to-image from a finished image is a run of its own, with nothing to go on from.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Leftover] = OrderedDict()

    def keep(
        self, samples: Tensor, sigmas: Tensor, carried: Sequence[Any], rehearsed: Rehearsed | None
    ) -> None:
        """Remember what a run leaves, unless it ended without noise or leaves nothing."""
        if not float(sigmas[-1]) or (rehearsed is None and all(value is None for value in carried)):
            return
        self._kept[_key(samples, sigmas[-1])] = Leftover(tuple(carried), rehearsed)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def find(self, noise: Tensor, latent: Tensor, sigmas: Tensor) -> Leftover | None:
        """What the run that this one goes on from has left, or None."""
        if not self._kept or bool(torch.count_nonzero(noise)):
            return None
        return self._kept.get(_key(latent, sigmas[0]))


def _key(samples: Tensor, sigma: Tensor) -> str:
    return f"{float(sigma):.6g} {fingerprint(samples)}"
