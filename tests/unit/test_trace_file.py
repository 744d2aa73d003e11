"""Files with a trace: PNG and JSON are read, and hostile or damaged files raise clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from safe_guidance.reports import trace_file
from safe_guidance.reports.trace import MAX_TEXTS, Record, Trace
from safe_guidance.reports.trace_strip import strip

EXAMPLE = Path(__file__).resolve().parents[2] / "assets" / "traces" / "demo_safety_trace.json"
TRACE = Trace(
    ("SLD",),
    (10.0, 5.0),
    4,
    (Record("SLD", 1, 5.0, (1.0,), (2.0,), (0.3,), (0.5,), 2, 1.5),),
    ("CFG is 1.",),
    8,
)


def png(path: Path, text: str | None, key: str = trace_file.METADATA) -> Path:
    """Write a small PNG, with a text if there is one."""
    info = PngInfo()
    if text is not None:
        info.add_text(key, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def changed(**entries: Any) -> dict[str, Any]:
    """Return the trace as data with these entries changed."""
    return {**json.loads(TRACE.to_json()), **entries}


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def changed_record(**entries: Any) -> dict[str, Any]:
    """Return the trace as data with these entries of its record changed."""
    content = json.loads(TRACE.to_json())
    content["records"][0] |= entries
    return content


def test_a_trace_is_read_from_json_and_from_a_png(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(TRACE.to_json(), encoding="utf-8")
    assert trace_file.read_trace(tmp_path / "trace.json") == TRACE
    assert trace_file.read_trace(png(tmp_path / "IMAGE.PNG", TRACE.to_json())) == TRACE


def test_the_bundled_example_can_be_drawn() -> None:
    trace = trace_file.read_trace(EXAMPLE)
    assert trace.methods == ("SLD", "Safe Denoiser") and len(trace.sigmas) == 20
    assert strip(trace).std() > 0


@pytest.mark.parametrize(
    "content",
    [
        changed(version=2),
        changed(version=True),
        changed(version=[1]),
        changed(version=nested(900)),
        changed(version="\ud800\n" * 1000),
        changed(version=10**4000),
        changed(methods=["\ud800"]),
        changed(sigmas=[1.0] * 200_000),
        changed(sigmas=nested(900)),
        changed(records=[nested(900)]),
        changed_record(gate=[[1.0]]),
        changed_record(gate=[True]),
        changed(methods="SLD"),
        changed(methods=[1]),
        changed(methods=["a" * 5000]),
        changed(methods=["SLD"] * (MAX_TEXTS + 1)),
        changed(sigmas=[1.0, "x"]),
        changed(sigmas=[float("nan"), 1.0]),
        changed(sigmas=[float("inf"), 1.0]),
        changed(sigmas=[10**400, 1.0]),
        changed(forwards=-1),
        changed(forwards=1.5),
        changed(records={}),
        changed(records=[[]]),
        changed(notes=None),
        changed_record(method="DAG"),
        changed_record(method=["SLD"]),
        changed_record(call=2),
        changed_record(call=True),
        changed_record(gate=[1.0, 1.0]),
        changed_record(gate=1.0),
        changed_record(sigma=None),
        changed_record(milliseconds="fast"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, content: Any) -> None:
    (tmp_path / "trace.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"not a safety trace(: it is not JSON| of version 1: .+)\. Choose a"
    ):
        trace_file.read_trace(tmp_path / "trace.json")


@pytest.mark.parametrize(
    "text", ["", "no json", "[" * 100_000, '{"a":' * 100_000, "\udcff".encode("utf-8", "replace").decode()]
)
def test_what_is_not_json_is_said_to_be_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON"):
        trace_file.read_trace(tmp_path / "trace.json")
    with pytest.raises(ValueError, match="not JSON|no safety trace"):
        trace_file.read_trace(png(tmp_path / "image.png", text or None))


def test_a_png_without_a_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image\.png holds no safety trace"):
        trace_file.read_trace(png(tmp_path / "image.png", TRACE.to_json(), key="workflow"))


def test_a_damaged_png_is_named(tmp_path: Path) -> None:
    whole = png(tmp_path / "whole.png", TRACE.to_json()).read_bytes()
    for length in (0, 4, 20, 60):
        (tmp_path / "image.png").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"image\.png"):
            trace_file.read_trace(tmp_path / "image.png")
    (tmp_path / "image.png").write_text(TRACE.to_json(), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as a PNG"):
        trace_file.read_trace(tmp_path / "image.png")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_file, "MAX_JSON_BYTES", 10)
    (tmp_path / "trace.json").write_text(TRACE.to_json(), encoding="utf-8")
    with pytest.raises(ValueError, match="10 at most"):
        trace_file.read_trace(tmp_path / "trace.json")
    with pytest.raises(ValueError, match="more than 10 bytes"):
        trace_file.read_trace(png(tmp_path / "image.png", TRACE.to_json()))
    monkeypatch.setattr(trace_file, "MAX_PNG_BYTES", 10)
    with pytest.raises(ValueError, match="10 at most"):
        trace_file.read_trace(tmp_path / "image.png")
