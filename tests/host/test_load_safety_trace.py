"""Load Safety Trace: files of the input folder only, and the drawing that Safety Trace makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safe_guidance.reports.trace import Record, Trace
from safe_guidance.reports.trace_file import SUFFIXES
from safe_guidance.reports.trace_strip import strip

TRACE = Trace(("SLD",), (10.0, 5.0), 4, (Record("SLD", 1, 5.0, (1.0,), (2.0,), (0.3,), (0.5,), 2, 1.5),))


@pytest.fixture
def inputs(host: Any) -> Iterator[Path]:
    """The host's input folder, without the files that a test leaves."""
    import folder_paths

    folder = Path(folder_paths.get_input_directory())
    before = set(folder.rglob("*"))
    yield folder
    for path in sorted(set(folder.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_a_file_of_the_input_folder_is_loaded_and_drawn(inputs: Path) -> None:
    from safe_guidance.nodes.safety_trace import LoadSafetyTraceNode

    (inputs / "runs").mkdir()
    (inputs / "runs" / "one.json").write_text(TRACE.to_json(), encoding="utf-8")
    trace, image = LoadSafetyTraceNode.execute("runs/one.json", "light").result
    assert trace == TRACE and torch.equal(image, strip(TRACE, "light"))
    output = LoadSafetyTraceNode.execute("runs/one.json", "dark")
    assert output.ui is not None and "SLD acted at 1 of 2 model calls" in output.ui["text"][0]


def test_the_bundled_example_comes_first_and_only_possible_files_are_listed(inputs: Path) -> None:
    from safe_guidance.nodes.host.files.input_files import TRACES, bundled_or_input_names
    from safe_guidance.nodes.safety_trace import LoadSafetyTraceNode

    for name in ("b.json", "a.PNG", "c.txt", ".hidden.json"):
        (inputs / name).write_text("", encoding="utf-8")
    names = bundled_or_input_names(TRACES, SUFFIXES)
    assert names[0] == "demo_safety_trace.json (bundled)"
    assert {"a.PNG", "b.json"} <= set(names) and not {"c.txt", ".hidden.json"} & set(names)
    assert LoadSafetyTraceNode.execute(names[0], "dark").result[0].methods == ("SLD", "Safe Denoiser")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "missing.json",
        "../secret.json",
        "/etc/passwd",
        "notes.txt",
        "link.json",
        "a\0b.json",
        "../x (bundled)",
        "../negation_sets/demo_star.safetensors (bundled)",
    ],
)
def test_other_files_are_not_read(inputs: Path, name: str) -> None:
    from safe_guidance.nodes.safety_trace import LoadSafetyTraceNode

    secret = inputs.parent / "secret.json"
    secret.write_text(TRACE.to_json(), encoding="utf-8")
    (inputs / "notes.txt").write_text(TRACE.to_json(), encoding="utf-8")
    os.symlink(secret, inputs / "link.json")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        LoadSafetyTraceNode.execute(name, "dark")


def test_a_changed_file_is_read_again(inputs: Path) -> None:
    """Also if its size and its times stay."""
    from safe_guidance.nodes.safety_trace import LoadSafetyTraceNode

    path = inputs / "one.json"
    path.write_text(TRACE.to_json(), encoding="utf-8")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    before = LoadSafetyTraceNode.fingerprint_inputs("one.json", theme="dark")
    content = path.read_text(encoding="utf-8")
    digit = next(character for character in content if character.isdigit())
    path.write_text(content.replace(digit, str((int(digit) + 1) % 10), 1), encoding="utf-8")
    os.utime(path, ns=times)
    assert LoadSafetyTraceNode.fingerprint_inputs("one.json", theme="dark") != before
