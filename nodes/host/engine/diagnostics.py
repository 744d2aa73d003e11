"""Messages after a run: what each correction did in it, and which settings had no effect and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ....guidance.core.noise_level import NoiseLevel
from ....reports.plain_text import log
from ....reports.trace import Trace, first_pass_sentences, sentence
from .correction import Attachment, Correction
from .node_messages import show_message
from .traces import Recorder

PROBED_SIGMAS = [0.02 * 1.2**i for i in range(48)]
"""Noise levels from 0.02 to 100, the range of the host's schedules; a correction active at none is off."""


def missing_branch(name: str) -> str:
    """Return the note for a sampler without the negative prompt that a method needs."""
    return (
        f"{name} needs a negative prompt, and this sampler has none. "
        "Use KSampler, or CFGGuider instead of BasicGuider."
    )


def costly_branch(name: str) -> str:
    """Return the note for CFG 1, at which the negative prompt is evaluated only because a method needs it."""
    return f"CFG is 1, so the negative prompt is evaluated for {name} alone. More CFG costs nothing more."


def outside_window(name: str, sigmas: Sequence[float]) -> str:
    """Return the note for a run whose noise levels all lie outside the window of a method."""
    ran = f"sampling ran from sigma {max(sigmas):.3g} to {min(sigmas):.3g}"
    advice = "Widen the window, or start from more noise (denoise)."
    return f"{name} did nothing: {ran}, outside its window. {advice}"


def add_inert_notes(attachments: Sequence[Attachment], recorder: Recorder) -> None:
    """Add a note to the run for every correction that is switched on and was never active."""
    trace = recorder.trace()
    if not trace.sigmas:
        return
    for attachment, name in zip(attachments, trace.methods):
        if not trace.of(name) and _is_on(attachment.correction):
            recorder.notes.append(outside_window(name, trace.sigmas))


def _is_on(correction: Correction) -> bool:
    return any(correction.is_active(NoiseLevel.variance_exploding(sigma)) for sigma in PROBED_SIGMAS)


def show_messages(attachments: Sequence[Attachment], trace: Trace) -> None:
    """Show what each correction did as a message on its node, and log the notes on settings."""
    for note in trace.notes:
        log(logging.WARNING, note)
    for attachment, name in zip(attachments, trace.methods):
        if not attachment.correction.name:
            continue
        note = next((note for note in trace.notes if name in note), None)
        lines = [note or sentence(trace.summary(name), len(trace.sigmas))]
        if attachment.correction.two_pass:
            lines += first_pass_sentences(trace)
        show_message(" ".join(lines), attachment.node)
