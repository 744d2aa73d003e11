"""A negation set as latents of one size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class References:
    """Latents of a negation set's pictures.

    Attributes:
        latents: (N, C, h, w), any float type.
        regions: (N, 1, h, w) in [0, 1], the part of each picture that is unwanted, or None when all of it is.
    """

    latents: Tensor
    regions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)
