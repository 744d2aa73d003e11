"""Traces: totals, words, the way through JSON, and a strip whose bars stand where they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safe_guidance.reports.trace import Record, Trace, numbered
from safe_guidance.reports.trace_strip import LANE, MARGIN, OKABE_ITO, THEMES, WIDTH, strip
from safe_guidance.reports.trace_text import sentence, table


def record(method: str, call: int, change: float, forwards: int = 0) -> Record:
    on = float(change > 0)
    return Record(method, call, 10.0 - call, (on, 0.0), (on, 0.0), (change, 0.0), (on, 0.0), forwards, 1.5)


TRACE = Trace(
    ("SLD", "Safe Denoiser", "DAG"),
    (10.0, 9.0, 8.0, 7.0),
    16,
    (
        record("Safe Denoiser", 0, 0.0),
        record("SLD", 1, 0.0, 2),
        record("SLD", 2, 0.2, 2),
        record("SLD", 3, 0.1, 2),
    ),
    ("DAG is off.",),
    8,
)


def test_totals() -> None:
    summary = TRACE.summary("SLD")
    assert (summary.allowed, summary.acted, summary.forwards) == (3, 2, 6)
    assert summary.largest_change == 0.2 and summary.milliseconds == 4.5
    assert (
        sentence(summary, 4)
        == "SLD acted at 2 of 4 model calls and changed the prediction by up to 20.0%, 6 extra predictions. "
        "It changed image 1 of 2."
    )
    assert "watched 1 of 4" in sentence(TRACE.summary("Safe Denoiser"), 4)
    assert sentence(TRACE.summary("DAG"), 4) == "DAG was not active in this run."


def test_equal_names_are_numbered() -> None:
    assert numbered(["SLD", "DAG", "SLD", "SLD"]) == ("SLD", "DAG", "SLD 2", "SLD 3")


def test_the_way_through_json() -> None:
    assert Trace.from_dict(json.loads(TRACE.to_json())) == TRACE


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"version": 2},
        {"version": 1},
        {**TRACE.to_dict(), "records": [{"method": "SLD"}]},
        {**TRACE.to_dict(), "rehearsal": "x"},
    ],
)
def test_something_else_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="not a safety trace"):
        Trace.from_dict(content)


def test_the_table_has_a_line_per_record_and_the_notes() -> None:
    lines = table(TRACE).splitlines()
    assert len(lines) == 3 + 2 + 2 + 4 and "DAG is off." in lines
    assert "The first of two passes took 8 predictions." in lines
    assert "20.00%" in lines[-2]


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_bars_stand_at_their_calls_and_in_their_lanes(theme: str) -> None:
    image = strip(TRACE, theme)
    assert image.shape[0] == 1 and image.shape[2:] == (WIDTH, 3) and 0 <= image.min() and image.max() <= 1
    first = torch.tensor([int(OKABE_ITO[0][i : i + 2], 16) for i in (1, 3, 5)]) / 255
    rows, columns = torch.where((image[0] - first).abs().amax(dim=-1) < 1e-3)
    # SLD acted at the last two of four calls: its bars fill the right half of the first lane, the first twice
    # as high.
    assert rows.max() < MARGIN + LANE and columns.min() >= WIDTH // 2 and columns.max() > WIDTH - 2 * MARGIN
    heights = [len(torch.unique(rows[(columns // (WIDTH // 4)) == quarter])) for quarter in (2, 3)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=2)


def contrast(a: str, b: str) -> float:
    """Return the contrast ratio of two luminances, as accessibility guidelines define it."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_on_both_backgrounds() -> None:
    assert all(
        contrast(colors.text, colors.background) > 7 and contrast(colors.line, colors.background) > 3
        for colors in THEMES.values()
    )


def test_an_empty_trace_says_so() -> None:
    assert strip(Trace((), (), 0, ())).std() > 0


def test_long_names_and_many_calls_fit(tmp_path: Path) -> None:
    name = "A method with a name that is far too long for a lane of four hundred pixels " * 2
    calls = 1000
    trace = Trace(
        (name,),
        tuple(float(calls - i) for i in range(calls)),
        0,
        tuple(record(name, i, 0.1) for i in range(calls)),
    )
    assert strip(trace).shape[2] == WIDTH
