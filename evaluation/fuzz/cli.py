"""`dev.py fuzz`: hostile files, numbers and texts for as long as wanted, in processes that may die."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..reliability import write_block

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("user files", "detector files", "nodes")
BATCH = 200
"""Inputs between two looks at the clock."""
TURN = 240.0
"""Seconds of one process, so that all groups get their share."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="dev.py fuzz", description=(__doc__ or "").splitlines()[0])
    found.add_argument("--minutes", type=float, default=10.0, help="how long; more finds more")
    found.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    found.add_argument("--seed", type=int, default=None, help="of the inputs; by default another every time")
    found.add_argument("--write", action="store_true", help="write the figures into docs/reliability.md")
    found.add_argument("--worker", choices=GROUPS, help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command and return 1 when an error was not clear or a process was lost."""
    options = parser().parse_args(list(arguments))
    if options.worker:
        return work(options.worker, options.minutes * 60, options.seed or 0)
    end = time.monotonic() + options.minutes * 60
    number = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    inputs: Counter[str] = Counter()
    failures: list[str] = []
    lost = 0
    while (left := end - time.monotonic()) > 0:
        turn = min(TURN, max(left / len(options.groups), 20.0))
        for group in options.groups:
            number += 1
            found, code = run_worker(group, turn, number)
            inputs.update(found["inputs"])
            failures += found["failures"]
            lost += code != 0
    text = report(inputs, failures, lost, options.minutes)
    sys.stdout.write(text + "\n")
    if options.write:
        write_block("fuzz", text)
    return int(bool(failures or lost))


def run_worker(group: str, seconds: float, number: int) -> tuple[dict[str, Any], int]:
    """Run a group in a process of its own and return what it found, and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "dev.py"), "--inside-the-environment", "fuzz"]
        command += ["--worker", group, "--minutes", str(seconds / 60), "--seed", str(number)]
        environ = {**os.environ, "SAFE_GUIDANCE_FUZZ": folder}
        code = subprocess.run(command, env=environ, check=False, stderr=subprocess.DEVNULL).returncode
        results = Path(folder) / "results.json"
        empty: dict[str, Any] = {"inputs": {}, "failures": []}
        return (json.loads(results.read_text(encoding="utf-8")) if results.exists() else empty), code


def work(group: str, seconds: float, number: int) -> int:
    """Try one group until the time is over; write the figures after every batch."""
    folder = Path(os.environ["SAFE_GUIDANCE_FUZZ"])
    batches = {"user files": user_batches, "detector files": detector_batches, "nodes": node_batches}
    inputs: Counter[str] = Counter()
    failures: list[str] = []
    runners = batches[group](folder)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, run_batch in runners.items():
            number += 1
            try:
                run_batch(number, lambda name=name: inputs.update([name]))  # type: ignore[misc]
            except Exception as error:
                errors = getattr(error, "exceptions", [error])
                failures += [f"{name}, seed {number}: {str(each)[:300]}" for each in errors]
            results = {"inputs": inputs, "failures": failures}
            (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
            if time.monotonic() > end:
                break
    return 0


Batch = Callable[[int, Callable[[], None]], None]


def user_batches(folder: Path) -> dict[str, Batch]:
    """Return what runs a batch of each kind of file that users keep."""
    from . import user_files

    return {name: file_batch(kind, folder) for name, kind in user_files.kinds().items()}


def detector_batches(folder: Path) -> dict[str, Batch]:
    """Return what runs a batch of each kind of detector file and of the pack's own caches."""
    import torch

    from ...formats import latent_file
    from ..host import import_host
    from . import detector_files

    import_host(folder / "host")
    path = folder / "valid.latents"
    latent_file.write(path, "key", 3, iter([(torch.ones(3, 4, 8, 8), torch.ones(3, 1, 8, 8))]))
    return {name: file_batch(kind, folder) for name, kind in detector_files.kinds(path).items()}


def file_batch(kind: Any, folder: Path) -> Batch:
    """Return what runs a batch of one kind of file."""
    from . import detector_files

    def run_batch(number: int, count: Callable[[], None]) -> None:
        def check(content: bytes) -> None:
            count()
            detector_files.answer(kind, content, folder)

        detector_files.run(kind, number, BATCH, check)

    return run_batch


def node_batches(folder: Path) -> dict[str, Batch]:
    """Return what runs a batch of inputs of each node."""
    from ..host import import_host

    import_host(folder / "host")
    from . import detector_files, node_inputs

    objects = node_inputs.Objects()

    def batch(node: Any) -> Batch:
        strategy = node_inputs.inputs(node, objects.defaults(node))

        def run_batch(number: int, count: Callable[[], None]) -> None:
            def check(given: Any) -> None:
                count()
                node_inputs.answer(node, given)

            detector_files.run(detector_files.Kind(strategy, "", Path), number, BATCH // 4, check)

        return run_batch

    return {node_id.removeprefix("SafeGuidance"): batch(node) for node_id, node in objects.fuzzed().items()}


def report(inputs: Counter[str], failures: Sequence[str], lost: int, minutes: float) -> str:
    """Return the figures as Markdown."""
    lines = [
        f"{inputs.total():,} inputs in {minutes:g} minutes: {len(failures)} batches with an unclear error, "
        f"{lost} processes lost.",
        "",
        "| input | number |",
        "| --- | --- |",
        *(f"| {name} | {count:,} |" for name, count in sorted(inputs.items())),
    ]
    if failures:
        lines += ["", *(f"- {' '.join(failure.split())}" for failure in failures[:20])]
    return "\n".join(lines)
