"""Trace of a sampling run: one record per correction and model call, with summaries and JSON conversion."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .plain_text import is_encodable, short

VERSION = 1
MAX_CALLS, MAX_RECORDS, MAX_SAMPLES = 100_000, 200_000, 4096
MAX_TEXTS, LONGEST_TEXT = 64, 2000
MAX_NUMBER = 1e12
"""Limits for trace files, far above what a run writes."""

NOT_FINITE = 2.0**39
"""Recorded instead of a number that is not finite: such a change is the largest one, and files stay JSON."""


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
        forwards: predictions evaluated for this method alone, counted per sample; a text that several methods
            share counts for the first.
        milliseconds: wall-clock time of the method and its forwards, without waiting for queued GPU work.
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
        return any(not value <= 0 for value in self.change)


@dataclass(frozen=True)
class Summary:
    """Totals of one method over a whole run; `allowed` and `acted` count model calls.

    `touched` says of every image of the batch whether it was changed.
    """

    method: str
    allowed: int
    acted: int
    largest_change: float
    forwards: int
    milliseconds: float
    touched: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Trace of one run.

    Attributes:
        methods: names of the corrections in the order of attaching; equal ones are numbered.
        sigmas: the sampler's noise level at every model call.
        forwards: predictions that the guider evaluated itself, counted per sample.
        records: those of every call in order.
        notes: sentences about settings that had no effect.
        rehearsal: predictions of the first of two passes, in which no method acts; counted per sample.
    """

    methods: tuple[str, ...]
    sigmas: tuple[float, ...]
    forwards: int
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()
    rehearsal: int = 0

    def of(self, method: str) -> list[Record]:
        """Return the records of one method."""
        return [record for record in self.records if record.method == method]

    def summary(self, method: str) -> Summary:
        """Return one method's totals."""
        own = self.of(method)
        return Summary(
            method,
            len(own),
            sum(record.acted for record in own),
            max((value for record in own for value in record.change), default=0.0),
            sum(record.forwards for record in own),
            sum(record.milliseconds for record in own),
            tuple(any(not value <= 0 for value in values) for values in zip(*(r.change for r in own))),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON, with the version of the format."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Any, name: str = "This") -> Trace:
        """Read a trace from the dictionary of `to_dict`, also after JSON. All values are validated.

        Raises:
            ValueError: this is no trace of this version; the message names the wrong entry.
        """
        try:
            return _read_trace(content)
        except ValueError as error:
            raise ValueError(
                f"{name} is not a safety trace of version {VERSION}: {error}. "
                "Choose a file that Save Image with Safety Trace wrote, or record the trace again."
            ) from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def _read_trace(content: Any) -> Trace:
    """Read a trace from decoded JSON.

    Raises:
        ValueError: an entry is missing or wrong.
    """
    if not isinstance(content, dict) or "version" not in content:
        raise ValueError("it has no version")
    if content["version"] != VERSION or isinstance(content["version"], bool):
        version = content["version"]
        raise ValueError(
            f"its version is {short(version) if isinstance(version, int | str) else 'no number'}"
        )
    methods = tuple(_text(name, "methods") for name in _entries(content, "methods", MAX_TEXTS))
    sigmas = _numbers(content, "sigmas", MAX_CALLS)
    records = tuple(
        _read_record(values, methods, len(sigmas)) for values in _entries(content, "records", MAX_RECORDS)
    )
    notes = tuple(_text(note, "notes") for note in _entries(content, "notes", MAX_TEXTS))
    return Trace(methods, sigmas, _count(content, "forwards"), records, notes, _count(content, "rehearsal"))


def _read_record(values: Any, methods: tuple[str, ...], calls: int) -> Record:
    if not isinstance(values, dict):
        raise ValueError("'records' holds something that is no record")
    method, call = values.get("method"), _count(values, "call")
    if method not in methods:
        raise ValueError("a record's 'method' is not among the trace's methods")
    if call >= calls:
        raise ValueError(f"a record's 'call' is {call}, and the run had {calls} model calls")
    per_sample = {name: _numbers(values, name, MAX_SAMPLES) for name in ("gate", "weight", "change", "area")}
    if len({len(numbers) for numbers in per_sample.values()}) > 1:
        raise ValueError(
            "a record has 'gate', 'weight', 'change' and 'area' for different numbers of samples"
        )
    return Record(
        method=method,
        call=call,
        sigma=_number(values.get("sigma"), "sigma"),
        forwards=_count(values, "forwards"),
        milliseconds=_number(values.get("milliseconds"), "milliseconds"),
        **per_sample,
    )


def _entries(values: dict[str, Any], name: str, most: int) -> Sequence[Any]:
    found = values.get(name)
    if not isinstance(found, list | tuple):
        raise ValueError(f"'{name}' is not a list")
    if len(found) > most:
        raise ValueError(f"'{name}' has more than {most} entries")
    return found


def _numbers(values: dict[str, Any], name: str, most: int) -> tuple[float, ...]:
    return tuple(_number(value, name) for value in _entries(values, name, most))


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        raise ValueError(f"'{name}' holds something that is not a finite number")
    return value


def _count(values: dict[str, Any], name: str) -> int:
    found = values.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= MAX_NUMBER:
        raise ValueError(f"'{name}' is not a whole number from 0 on")
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or not is_encodable(value):
        raise ValueError(f"'{name}' holds something that is not a text of at most {LONGEST_TEXT} characters")
    return value


def numbered(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names, with repeated ones numbered: SLD, SLD 2."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return tuple(found)
