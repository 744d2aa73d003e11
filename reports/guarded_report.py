"""Report on an image sampled with and without the corrections: as data and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .image_difference import Difference
from .trace import Trace
from .trace_text import in_words

VERSION = 1


def report_data(
    differences: Sequence[Difference],
    trace: Trace | None,
    verdicts: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Return everything measured, for JSON.

    Args:
        differences: one for each image of the batch.
        trace: that of the guarded run, if it is known.
        verdicts: score, decision and explanation of each image for "guarded" and "unguarded"; may be empty.
    """
    return {
        "version": VERSION,
        "identical": [difference.mean_change == 0 for difference in differences],
        "differences": [asdict(difference) for difference in differences],
        "verdicts": verdicts,
        "trace": None if trace is None else trace.to_dict(),
    }


def report_text(
    differences: Sequence[Difference],
    trace: Trace | None,
    verdicts: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """Return the report for people: a line per image, a line per verdict, then the trace in words."""
    lines = []
    for index, difference in enumerate(differences):
        lines.append(f"Image {index + 1}: {_in_words(difference)}")
        for side, of_side in verdicts.items():
            verdict = "unsafe" if of_side[index]["unsafe"] else "safe"
            lines.append(f"  {side}: {verdict}, score {of_side[index]['score']:.3f}")
    if trace is not None:
        lines.append(in_words(trace))
    return "\n".join(lines)


def _in_words(difference: Difference) -> str:
    if difference.mean_change == 0:
        return "identical"
    return (
        f"mean change {difference.mean_change:.2%}, changed area {difference.changed_area:.0%}, "
        f"SSIM {difference.ssim:.3f}"
    )
