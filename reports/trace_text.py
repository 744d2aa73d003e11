"""A trace in words: a sentence for each method, and a table of every record."""

from __future__ import annotations

from .trace import NOT_FINITE, Summary, Trace


def sentence(summary: Summary, calls: int) -> str:
    """Describe one method's run in a sentence."""
    if summary.acted:
        extra = f", {summary.forwards} extra predictions" if summary.forwards else ""
        change = (
            f"changed the prediction by up to {summary.largest_change:.1%}"
            if summary.largest_change < NOT_FINITE
            else "made values that are not finite, which ruin the image. Check its settings and what it gets"
        )
        calls_acted = f"{summary.acted} of {calls} model calls"
        return f"{summary.method} acted at {calls_acted} and {change}{extra}.{_touched(summary)}"
    if summary.allowed:
        return f"{summary.method} watched {summary.allowed} of {calls} model calls and changed nothing."
    return f"{summary.method} was not active in this run."


def _touched(summary: Summary) -> str:
    """Return which images of a batch were changed, as a further sentence; empty for a single image."""
    count = len(summary.touched)
    if count < 2:
        return ""
    numbers = [str(index + 1) for index, touched in enumerate(summary.touched) if touched]
    if len(numbers) == count:
        return f" It changed all {count} images."
    named = f"image {numbers[0]}" if len(numbers) == 1 else f"images {', '.join(numbers)}"
    return f" It changed {named} of {count}."


def first_pass_sentences(trace: Trace) -> list[str]:
    """Return a sentence on the cost of the first of two passes; none for a run of one pass."""
    if not trace.rehearsal:
        return []
    return [f"The first of two passes took {trace.rehearsal} predictions."]


def in_words(trace: Trace) -> str:
    """Describe a trace in a line for each method, followed by the notes."""
    methods = [sentence(trace.summary(method), len(trace.sigmas)) for method in trace.methods]
    return "\n".join([*methods, *first_pass_sentences(trace), *trace.notes])


def table(trace: Trace) -> str:
    """Format a trace as text: the totals, then every record with the largest value of any sample."""
    lines = [in_words(trace)]
    width = max((len(method) for method in trace.methods), default=6)
    lines += [
        "",
        f"{'call':>4} {'sigma':>8}  {'method':{width}} "
        f"{'gate':>5} {'weight':>7} {'change':>7} {'area':>5} {'extra':>5} {'ms':>7}",
    ]
    for r in trace.records:
        gate = max(r.gate, default=0.0)
        weight = max(r.weight, default=0.0)
        change = max(r.change, default=0.0)
        area = max(r.area, default=0.0)
        numbers = f"{gate:5.2f} {weight:7.3g} {change:7.2%} {area:5.2f} {r.forwards:5} {r.milliseconds:7.1f}"
        lines.append(f"{r.call:4} {r.sigma:8.3f}  {r.method:{width}} {numbers}")
    return "\n".join(lines)
