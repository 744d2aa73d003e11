"""A negation set as latents of one size, read a chunk at a time so that any number of them fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Numbers converted to single precision at a time: 16 MB, which a processor's cache and any graphics card hold."""

NEGLIGIBLE_WEIGHT = 1e-9
"""References whose weights together stay below this are lost in the rounding of a mean."""


@dataclass(frozen=True)
class References:
    """Latents of a negation set's images, kept in any float type (half precision, usually) on any device.

    Attributes:
        latents: (N, C, h, w) as stored, possibly a file mapped into memory.
        regions: (N, 1, h, w) in [0, 1], the part of each image that is unwanted, or None when all of it is.
        prepare: what takes stored latents, in float32 or wider, to the sampler's space, or None when they are there already.
    """

    latents: Tensor
    regions: Tensor | None = None
    prepare: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def nbytes(self) -> int:
        """Size of the latents as stored."""
        return self.latents.numel() * self.latents.element_size()

    def rows(self, wanted: slice | Tensor, device: torch.device | None = None) -> Tensor:
        """Chosen latents in the sampler's space, float32 or wider."""
        chosen = self.latents[wanted]
        chosen = chosen.to(device or chosen.device).to(torch.promote_types(chosen.dtype, torch.float32))
        return chosen if self.prepare is None else self.prepare(chosen)

    def chunks(self, device: torch.device, wanted: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """All latents in the sampler's space, a few at a time, with their place in the set.

        `wanted` (N,) bool leaves out chunks in which it is False everywhere.
        """
        count = max(1, CHUNK_ELEMENTS // max(1, self.latents[0].numel()))
        needed = None if wanted is None else wanted.cpu()
        for start in range(0, len(self), count):
            part = slice(start, min(start + count, len(self)))
            if needed is None or bool(needed[part].any()):
                yield part, self.rows(part, device)

    def collect(self, device: torch.device, rows: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute` of every chunk, (rows, n) each, side by side: (rows, N).

        Results go into one tensor that is there from the start: small ones kept between the large chunks would keep the memory
        of every chunk from being used again.
        """
        found: Tensor | None = None
        for part, z in self.chunks(device):
            values = compute(z)
            if found is None:
                found = values.new_empty(rows, len(self))
            found[:, part] = values
        assert found is not None
        return found

    def then(self, change: Callable[[Tensor], Tensor]) -> References:
        """The same references, changed further whenever they are read."""
        first = self.prepare
        return References(self.latents, self.regions, change if first is None else lambda z: change(first(z)))

    def mean(self, weights: Tensor) -> Tensor:
        """sum_n w_n z_n, streamed: (B, N) -> (B, C, h, w). References without weight are not read."""
        shape = self.latents.shape[1:]
        total = weights.new_zeros(len(weights), shape.numel())
        for part, z in self.chunks(weights.device, wanted=(weights > NEGLIGIBLE_WEIGHT / len(self)).any(0)):
            total += weights[:, part] @ z.flatten(1).to(weights.dtype)
        return total.unflatten(1, shape)

    def resident(self, device: torch.device) -> References:
        """The same references on a device, in the sampler's space and in the type they are stored in."""
        if self.prepare is None and self.latents.device == device:
            return self
        latents = torch.empty_like(self.latents, device=device)
        for part, chunk in self.chunks(device):
            latents[part] = chunk.to(latents.dtype)
        return References(latents, self.regions)
