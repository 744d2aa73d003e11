"""Traces: recording them while the host samples, and finding the trace of an image afterwards."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....guidance.core.composition import Change
from ....reports.trace import NOT_FINITE, Record, Trace, numbered

KEPT = 32
"""Number of runs that a model remembers."""


@dataclass
class _Entry:
    """Record of one correction at one model call.

    The values stay on the sampler's device, because reading them would make the host wait for it.
    """

    method: int
    call: int
    sigma: float
    forwards: int = 0
    seconds: float = 0.0
    values: Tensor | None = None
    """(4, B): gate, weight, change, area."""


@dataclass
class Recorder:
    """Record of what the corrections of one run do. It changes no value and waits for no device."""

    names: Sequence[str]
    notes: list[tuple[int, str]] = field(default_factory=list)
    """Sentences on settings that had no effect or cost more, each with the index of its correction."""
    forwards: int = 0
    """Number of predictions evaluated so far, for the guider and for all corrections, counted per sample."""
    first_pass_forwards: int = 0
    """Predictions of the first pass, if the run is the second one of two."""

    def __post_init__(self) -> None:
        self.methods = numbered(self.names)
        """The names, with repeated ones numbered, as traces and messages use them."""
        self._sigmas: list[float] = []
        self._entries: list[_Entry] = []
        self._now: dict[int, _Entry] = {}
        self._batch = 1

    def call(self, sigma: float, batch: int, active: Sequence[int]) -> None:
        """Begin a model call, at which the corrections with these indices may act."""
        self._now = {index: _Entry(index, len(self._sigmas), sigma) for index in active}
        self._sigmas.append(sigma)
        self._entries += self._now.values()
        self._batch = batch

    def note(self, index: int, text: str) -> None:
        """Add a sentence on the settings of a correction, once."""
        if (index, text) not in self.notes:
            self.notes.append((index, text))

    @contextmanager
    def spending(self, *indices: int) -> Iterator[None]:
        """Charge the time and the predictions of the block to these corrections, in equal parts."""
        start, forwards = time.perf_counter(), self.forwards
        try:
            yield
        finally:
            for index in indices:
                self._now[index].seconds += (time.perf_counter() - start) / len(indices)
                self._now[index].forwards += (self.forwards - forwards) // len(indices)

    def changed(self, index: int, change: Change, denoised: Tensor) -> None:
        """Record what a correction adds to the prediction."""
        active = change.active.to(change.delta.device)
        share = _norm(change.delta) / _norm(denoised).clamp_min(1e-6)
        gate = torch.ones_like(share) if change.gate is None else change.gate.to(share)
        weight = gate if change.weight is None else change.weight.to(share)
        area = torch.ones_like(share) if change.area is None else change.area.to(share)
        values = torch.stack([value.expand_as(share) for value in (gate, weight, share, area)])  # (4, B)
        values = values.nan_to_num(NOT_FINITE, NOT_FINITE, -NOT_FINITE)
        self._now[index].values = torch.where(active, values, 0)

    def trace(self) -> Trace:
        """Return the trace of the run so far."""
        records = tuple(self._record(entry, self.methods[entry.method]) for entry in self._entries)
        own = self.forwards - sum(entry.forwards for entry in self._entries)
        return Trace(
            self.methods,
            tuple(self._sigmas),
            own,
            records,
            tuple(dict.fromkeys(text for _, text in self.notes)),
            self.first_pass_forwards,
        )

    def _record(self, entry: _Entry, method: str) -> Record:
        values = [[0.0] * self._batch] * 4 if entry.values is None else entry.values.tolist()
        return Record(
            method, entry.call, entry.sigma, *map(tuple, values), entry.forwards, 1000 * entry.seconds
        )


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1).float(), dim=1)


class TraceStore:
    """Traces of a MODEL's last runs, found by the latents that came out."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Recorder] = OrderedDict()

    def keep(self, samples: Tensor, recorder: Recorder) -> None:
        """Remember the trace of the run that gave these samples, and forget the oldest one beyond `KEPT`."""
        self._kept[fingerprint(samples)] = recorder
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def find(self, samples: Tensor) -> Trace | None:
        """Return the trace of the run that gave these samples, or None."""
        recorder = self._kept.get(fingerprint(samples))
        return None if recorder is None else recorder.trace()


def fingerprint(samples: Tensor) -> str:
    """Return a hash that identifies latents regardless of device and dtype."""
    # The host may pass latents on in half precision and on another device. Rounding both sides makes them
    # equal.
    values = samples.detach().to("cpu", torch.float16).contiguous()
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=16).hexdigest() + str(tuple(values.shape))
