"""Latents of a negation set's images, read in chunks so that a set of any size fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Numbers converted to single precision at a time: 16 MB, which fits a processor's cache and any graphics
card."""

NEGLIGIBLE_WEIGHT = 1e-9
"""References whose weights sum to less than this do not change a weighted mean beyond rounding."""


def evenly_spread(count: int, most: int) -> Tensor:
    """Return at most `most` indices evenly spread from 0 to count - 1, both included: (n,) long."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def unit_pixels(latents: Tensor, least: float = 0.0) -> Tensor:
    """Scale every latent pixel to a unit vector over the channels: (N, C, h, w) -> (N, C, h, w).

    Args:
        latents: (N, C, h, w).
        least: lower bound of the length that pixels are divided by. With 0 a pixel that is zero becomes NaN.
    """
    return latents / torch.linalg.vector_norm(latents, dim=1, keepdim=True).clamp_min(least)


@dataclass(frozen=True)
class References:
    """Latents of a negation set's images, stored in any float type (usually half precision) on any device.

    Attributes:
        latents: (N, C, h, w) as stored, possibly a file mapped into memory.
        regions: (N, 1, h, w) in [0, 1], the unwanted part of each image, or None when all of every image is
            unwanted.
        prepare: converts stored latents, in float32 or wider, to the sampler's space; None when they are in
            it already.
    """

    latents: Tensor
    regions: Tensor | None = None
    prepare: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def nbytes(self) -> int:
        """Return the size of the latents as stored, in bytes."""
        return self.latents.numel() * self.latents.element_size()

    def read(self, indices: slice | Tensor, device: torch.device | None = None) -> Tensor:
        """Return chosen latents in the sampler's space, float32 or wider, on a device or where they are."""
        chosen = self.latents[indices]
        chosen = chosen.to(device or chosen.device).to(torch.promote_types(chosen.dtype, torch.float32))
        return chosen if self.prepare is None else self.prepare(chosen)

    def chunks(self, device: torch.device, wanted: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield all latents in the sampler's space, a chunk at a time, each with its position in the set.

        `wanted` (N,) bool skips the chunks in which it is False everywhere.
        """
        count = max(1, CHUNK_ELEMENTS // max(1, self.latents[0].numel()))
        needed = None if wanted is None else wanted.cpu()
        for start in range(0, len(self), count):
            part = slice(start, min(start + count, len(self)))
            if needed is None or bool(needed[part].any()):
                yield part, self.read(part, device)

    def collect(self, device: torch.device, samples: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `compute` to every chunk, (samples, n) each, and return all results: (samples, N).

        The results go into one tensor that exists from the start. Small tensors allocated between the large
        chunks would keep the memory of the chunks from being reused.
        """
        found: Tensor | None = None
        for part, z in self.chunks(device):
            values = compute(z)
            if found is None:
                found = values.new_empty(samples, len(self))
            found[:, part] = values
        assert found is not None
        return found

    def then(self, change: Callable[[Tensor], Tensor]) -> References:
        """Return the same references with a further change applied whenever they are read."""
        first = self.prepare
        return References(self.latents, self.regions, change if first is None else lambda z: change(first(z)))

    def mean(self, weights: Tensor) -> Tensor:
        """Return the weighted sum sum_n w_n z_n: (B, N) -> (B, C, h, w).

        Chunks without weight are not read.
        """
        shape = self.latents.shape[1:]
        total = weights.new_zeros(len(weights), shape.numel())
        for part, z in self.chunks(weights.device, wanted=(weights > NEGLIGIBLE_WEIGHT / len(self)).any(0)):
            total += weights[:, part] @ z.flatten(1).to(weights.dtype)
        return total.unflatten(1, shape)  # (B, C, h, w)

    def resident(self, device: torch.device) -> References:
        """Return the same references in a device's memory, in the sampler's space and their stored type."""
        if self.prepare is None and self.latents.device == device:
            return self
        latents = torch.empty_like(self.latents, device=device)
        for part, chunk in self.chunks(device):
            latents[part] = chunk.to(latents.dtype)
        return References(latents, self.regions)
