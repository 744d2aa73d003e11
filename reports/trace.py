"""What corrections did during a sampling run: one record per correction and model call, and what to read from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

VERSION = 1


@dataclass(frozen=True)
class Record:
    """One correction at one model call at which it was allowed to act. Values per sample of the batch.

    Attributes:
        method: the correction's name in this trace.
        call: number of the model call in the run, from 0.
        sigma: the sampler's noise level.
        gate: how far the method's gate was open, 0 to 1; 0 when it left the sample alone.
        weight: the method's own multiplier of its change; its gate where a method has none.
        change: norm of the method's change, before the joint cap, relative to that of the prediction.
        area: share of the image acted on, 0 to 1.
        forwards: predictions evaluated for this method alone, counted per sample; a text that several methods share counts
            for the first.
        milliseconds: time that the method and its forwards took on the host's clock; queued work of a GPU is not waited for.
    """

    method: str
    call: int
    sigma: float
    gate: tuple[float, ...]
    weight: tuple[float, ...]
    change: tuple[float, ...]
    area: tuple[float, ...]
    forwards: int
    milliseconds: float

    @property
    def acted(self) -> bool:
        return any(value > 0 for value in self.change)


@dataclass(frozen=True)
class Summary:
    """One method over a whole run; `allowed` and `acted` count model calls."""

    method: str
    allowed: int
    acted: int
    largest_change: float
    forwards: int
    milliseconds: float


@dataclass(frozen=True)
class Trace:
    """A run.

    Attributes:
        methods: names of the corrections in the order of attaching; equal ones are numbered.
        sigmas: the sampler's noise level at every model call.
        forwards: predictions that the guider evaluated itself, counted per sample.
        records: those of every call in order.
        notes: sentences about settings that had no effect.
        rehearsal: predictions of a run before, from the same noise, in which methods only watched; counted per sample.
    """

    methods: tuple[str, ...]
    sigmas: tuple[float, ...]
    forwards: int
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()
    rehearsal: int = 0

    def of(self, method: str) -> list[Record]:
        """The records of one method."""
        return [record for record in self.records if record.method == method]

    def summary(self, method: str) -> Summary:
        """One method's totals."""
        own = self.of(method)
        return Summary(
            method,
            len(own),
            sum(record.acted for record in own),
            max((value for record in own for value in record.change), default=0.0),
            sum(record.forwards for record in own),
            sum(record.milliseconds for record in own),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with a version."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Any) -> Trace:
        """The trace of `to_dict`, also after a way through JSON.

        Raises:
            ValueError: when it is no trace of this version.
        """
        try:
            if content["version"] != VERSION:
                raise ValueError
            records = tuple(_record(values) for values in content["records"])
            rest = {name: tuple(content[name]) for name in ("methods", "sigmas", "notes")}
            return cls(
                forwards=int(content["forwards"]),
                records=records,
                rehearsal=int(content["rehearsal"]),
                **rest,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"This is not a safety trace of version {VERSION}. Record it again.") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def _record(values: dict[str, Any]) -> Record:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Record(**fields)


def numbered(names: Iterable[str]) -> tuple[str, ...]:
    """The names, equal ones told apart by a number: SLD, SLD 2."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return tuple(found)


def sentence(summary: Summary, calls: int) -> str:
    """One method's run in words."""
    if summary.acted:
        extra = f", {summary.forwards} extra predictions" if summary.forwards else ""
        change = f"changed the prediction by up to {summary.largest_change:.1%}"
        return f"{summary.method} acted at {summary.acted} of {calls} model calls and {change}{extra}."
    if summary.allowed:
        return f"{summary.method} watched {summary.allowed} of {calls} model calls and changed nothing."
    return f"{summary.method} was not active in this run."


def first_pass_sentences(trace: Trace) -> list[str]:
    """Return a sentence on the cost of the first of two passes; none for a run of one pass."""
    if not trace.rehearsal:
        return []
    return [f"The first of two passes took {trace.rehearsal} predictions."]


def in_words(trace: Trace) -> str:
    """A line for each method, then the notes."""
    methods = [sentence(trace.summary(method), len(trace.sigmas)) for method in trace.methods]
    return "\n".join([*methods, *first_pass_sentences(trace), *trace.notes])


def table(trace: Trace) -> str:
    """A trace as text: the methods' totals, then every record, per sample the largest value."""
    lines = [in_words(trace)]
    width = max((len(method) for method in trace.methods), default=6)
    lines += [
        "",
        f"{'call':>4} {'sigma':>8}  {'method':{width}} {'gate':>5} {'weight':>7} {'change':>7} {'area':>5} {'extra':>5} {'ms':>7}",
    ]
    for r in trace.records:
        gate, weight, change, area = (
            max(values, default=0.0) for values in (r.gate, r.weight, r.change, r.area)
        )
        numbers = f"{gate:5.2f} {weight:7.3g} {change:7.2%} {area:5.2f} {r.forwards:5} {r.milliseconds:7.1f}"
        lines.append(f"{r.call:4} {r.sigma:8.3f}  {r.method:{width}} {numbers}")
    return "\n".join(lines)
