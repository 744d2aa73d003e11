"""Says, once a run has ended, what each correction did in it, and which settings had no effect and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from ....guidance.core.noise_level import NoiseLevel
from ....reports.trace import Trace, rehearsed, sentence
from .node_messages import show_text

PROBED_SIGMAS = [0.02 * 1.2**i for i in range(48)]
"""Noise levels of every schedule of the host, from 0.02 to about 100: a correction that acts at none of them is switched off."""


class Corrective(Protocol):
    """What is asked of a correction."""

    name: str
    node: str | None
    rehearses: bool

    def is_active(self, level: NoiseLevel) -> bool: ...


def missing_branch(name: str) -> str:
    return f"{name} needs a negative prompt, and this sampler has none. Use KSampler, or CFGGuider instead of BasicGuider."


def costly_branch(name: str) -> str:
    return f"CFG is 1, so the negative prompt is evaluated for {name} alone. More CFG costs nothing more."


def outside_window(name: str, sigmas: Sequence[float]) -> str:
    ran = f"sampling ran from sigma {max(sigmas):.3g} to {min(sigmas):.3g}"
    return f"{name} did nothing: {ran}, outside its window. Widen the window, or start from more noise (denoise)."


def inert_notes(corrections: Sequence[Corrective], trace: Trace) -> list[str]:
    """A sentence for every correction that is switched on and was never allowed to act."""
    if not trace.sigmas:
        return []
    idle = [(c, name) for c, name in zip(corrections, trace.methods) if not trace.of(name) and _is_on(c)]
    return [outside_window(name, trace.sigmas) for _, name in idle]


def _is_on(correction: Corrective) -> bool:
    return any(correction.is_active(NoiseLevel.variance_exploding(sigma)) for sigma in PROBED_SIGMAS)


def tell(corrections: Sequence[Corrective], trace: Trace) -> None:
    """Show each correction's run under the node that attached it, and log what had no effect."""
    for note in trace.notes:
        logging.warning("Safe Guidance: %s", note)
    named = [(correction, name) for correction, name in zip(corrections, trace.methods) if correction.name]
    for correction, name in named:
        note = next((note for note in trace.notes if name in note), None)
        told = [
            note or sentence(trace.summary(name), len(trace.sigmas)),
            *(rehearsed(trace) if correction.rehearses else []),
        ]
        show_text(" ".join(told), correction.node)
