"""What recording a trace costs: seconds inside the recorder, as a share of the sampling run that it records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class _Clock:
    """Adds up the seconds of its blocks; a block inside another counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._start


class _TimedEdges:
    """A context manager whose entering and leaving are timed, and what happens inside is not."""

    def __init__(self, clock: _Clock, inner: AbstractContextManager[None]) -> None:
        self._clock, self._inner = clock, inner

    def __enter__(self) -> None:
        with self._clock:
            self._inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        with self._clock:
            return self._inner.__exit__(*error)


@contextmanager
def _timed() -> Iterator[_Clock]:
    from ...nodes.host.engine.traces import Recorder, TraceStore

    clock = _Clock()

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            with clock:
                return method(*args, **kwargs)

        return replacement

    def edges(method: Callable[..., AbstractContextManager[None]]) -> Callable[..., Any]:
        return lambda *args: _TimedEdges(clock, method(*args))

    of_recorder: dict[str, Any] = {
        name: timed(getattr(Recorder, name)) for name in ("call", "changed", "trace")
    }
    replaced = {
        Recorder: {**of_recorder, "spending": edges(Recorder.spending)},
        TraceStore: {"keep": timed(TraceStore.keep)},
    }
    originals = {owner: {name: vars(owner)[name] for name in methods} for owner, methods in replaced.items()}

    def put(methods: dict[type, dict[str, Any]]) -> None:
        for owner, of_owner in methods.items():
            for name, method in of_owner.items():
                setattr(owner, name, method)

    put(replaced)
    try:
        yield clock
    finally:
        put(originals)


def recording_share(run: Callable[[], Any]) -> float:
    """The share of the seconds of `run`, which samples with corrections, that their recorder takes."""
    with _timed() as clock:
        start = time.perf_counter()
        run()
        return clock.seconds / (time.perf_counter() - start)
