"""Messages after a run: what each correction did in it, and which settings had no effect and why."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from ....guidance.core.noise_level import NoiseLevel
from ....reports.plain_text import log
from ....reports.trace_text import first_pass_sentences, sentence
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


def costly_branch(name: str, cond_scale: float) -> str:
    """Return the note for a negative prompt that is evaluated only because a method needs it."""
    if math.isclose(cond_scale, 1.0):
        return f"CFG is 1, so the negative prompt is evaluated for {name} alone. More CFG costs nothing more."
    return (
        "The sampler left the negative prompt out of some model calls, because another node skips, caches or "
        f"replaces it. It was evaluated for {name} alone there."
    )


def unmoved_prediction(name: str) -> str:
    """Return the note for a prediction that stayed the same although its text embedding had changed."""
    return (
        f"{name} changed the text embeddings, and some predictions stayed the same to the last bit. "
        "Another node that caches predictions, such as TeaCache, has probably answered: remove it."
    )


def cached_text(name: str) -> str:
    """Return the note for a text whose prediction is exactly that of the prompt or the negative prompt."""
    return (
        f"The prediction for the text of {name} was exactly that of the prompt or the negative prompt. If "
        "the texts differ, another node that caches predictions, such as TeaCache, has answered: remove it."
    )


def outside_window(name: str, sigmas: Sequence[float]) -> str:
    """Return the note for a run whose noise levels all lie outside the window of a method."""
    ran = f"sampling ran from sigma {max(sigmas):.3g} to {min(sigmas):.3g}"
    advice = "Widen the window, or start from more noise (denoise)."
    return f"{name} did nothing: {ran}, outside its window. {advice}"


def limited_by_noise(name: str) -> str:
    """Return the note for a schedule that rises, where changes are limited to the size of the noise."""
    return (
        f"The noise schedule rises (un-sampling), so {name} changes predictions by at most the noise level. "
        f"Leave {name} out of an un-sampling run whose result should give back the same image."
    )


def add_remarks(attachments: Sequence[Attachment], states: Sequence[Any], recorder: Recorder) -> None:
    """Add what the corrections say about their settings to the notes of the run, given their states."""
    for index, (attachment, state) in enumerate(zip(attachments, states)):
        for remark in attachment.correction.remarks(state):
            recorder.note(index, remark)


def add_inert_notes(attachments: Sequence[Attachment], recorder: Recorder) -> None:
    """Add a note to the run for every correction that is switched on and was never active."""
    trace = recorder.trace()
    if not trace.sigmas:
        return
    for index, (attachment, name) in enumerate(zip(attachments, trace.methods)):
        if not trace.of(name) and _is_on(attachment.correction):
            recorder.note(index, outside_window(name, trace.sigmas))


def _is_on(correction: Correction) -> bool:
    return any(correction.is_active(NoiseLevel.variance_exploding(sigma)) for sigma in PROBED_SIGMAS)


def show_messages(attachments: Sequence[Attachment], recorder: Recorder) -> None:
    """Show on every node what its corrections did, and log the notes on settings."""
    trace = recorder.trace()
    for note in trace.notes:
        log(logging.WARNING, note)
    messages: dict[str | None, list[str]] = {}
    for index, (attachment, name) in enumerate(zip(attachments, trace.methods)):
        if not attachment.correction.name:
            continue
        lines = messages.setdefault(attachment.node, [])
        summary = trace.summary(name)
        notes = [text for of, text in recorder.notes if of == index]
        if summary.acted or not notes:
            lines.append(sentence(summary, len(trace.sigmas)))
        if attachment.correction.found:
            lines.append(attachment.correction.found)
        lines += notes
        if attachment.correction.two_pass:
            lines += first_pass_sentences(trace)
    for node, lines in messages.items():
        show_message("\n".join(lines), node)
