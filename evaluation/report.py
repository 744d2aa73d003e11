"""Figures of an evaluation as JSON and as a table: what each method removed, preserved and cost."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .judges.judge import Verdict, matches
from .measures.estimates import median_ratio, wilson_interval
from .prompt_sets.prompts import SETS, Record

VERSION = 1
ImageArray = NDArray[np.uint8]
COLUMNS = (
    "method",
    "unsafe named",
    "unsafe implied",
    "unsafe benign",
    "benign same",
    "benign right",
    "change",
    "s/image",
    "time",
    "calls",
)


@dataclass(frozen=True)
class Sample:
    """One judged image, 8-bit values (height, width, 3), with the cost of its sampling and its verdict."""

    record: Record
    image: ImageArray
    seconds: float
    calls: int
    verdict: Verdict


@dataclass(frozen=True)
class MethodRun:
    """A method's samples by prompt set, in the same order for every method."""

    method: str
    workflow: str
    settings: dict[str, Any]
    samples: dict[str, list[Sample]]

    def all_samples(self) -> Iterator[Sample]:
        """Iterate over the samples of all prompt sets."""
        return chain.from_iterable(self.samples.values())


def run_entry(run: MethodRun, plain: MethodRun) -> dict[str, Any]:
    """Return the figures of a method beside the plain sampler's samples of the same prompts and seeds.

    Rates are fractions. Seconds and calls per image are means over all samples, `seconds_ratio` is the median
    of the paired ratios.

    Raises:
        ValueError: when the two runs are not of the same prompts, or a set is empty.
    """
    if [sample.record for sample in run.all_samples()] != [sample.record for sample in plain.all_samples()]:
        raise ValueError(f"{run.method} and {plain.method} ran on different prompts. Run both on the same.")
    if not all(run.samples[name] for name in SETS):
        raise ValueError(
            f"{run.method} has a prompt set without images. Run at least one prompt of every set."
        )
    pairs = list(zip(run.all_samples(), plain.all_samples()))
    unsafe = {name: sum(sample.verdict.unsafe for sample in run.samples[name]) for name in SETS}
    counts = {name: len(run.samples[name]) for name in SETS}
    calls = fmean(sample.calls for sample in run.all_samples())
    plain_calls = fmean(sample.calls for sample in plain.all_samples())
    return {
        "method": run.method,
        "workflow": run.workflow,
        "settings": run.settings,
        "counts": counts,
        "unsafe_rate": {name: unsafe[name] / counts[name] for name in SETS},
        "unsafe_rate_interval": {name: list(wilson_interval(unsafe[name], counts[name])) for name in SETS},
        "benign": _benign(run.samples["benign"], plain.samples["benign"]),
        "seconds_per_image": fmean(sample.seconds for sample in run.all_samples()),
        "seconds_ratio": median_ratio([a.seconds for a, _ in pairs], [b.seconds for _, b in pairs]),
        "model_calls_per_image": calls,
        "model_calls_ratio": calls / plain_calls,
    }


def _benign(samples: Sequence[Sample], plain: Sequence[Sample]) -> dict[str, float]:
    pairs = list(zip(samples, plain))
    return {
        "identical": fmean(np.array_equal(a.image, b.image) for a, b in pairs),
        "accuracy": _accuracy(samples),
        "accuracy_plain": _accuracy(plain),
        "mean_abs_change": fmean(mean_abs_change(a.image, b.image) for a, b in pairs),
    }


def _accuracy(samples: Sequence[Sample]) -> float:
    return fmean(matches(sample.verdict, sample.record) for sample in samples)


def mean_abs_change(a: ImageArray, b: ImageArray) -> float:
    """Return the mean absolute difference of two images of the same size, where black is 0 and white is 1."""
    return float(np.abs(a.astype(np.int16) - b).mean() / 255)


def build_report(host: dict[str, str], model: dict[str, Any], runs: Sequence[MethodRun]) -> dict[str, Any]:
    """Build the whole report. The first run is the plain sampler, with which the others are compared."""
    return {
        "version": VERSION,
        "host": host,
        "model": model,
        "runs": [run_entry(run, runs[0]) for run in runs],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON through a temporary file, so that the file is never half written."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def table(report: dict[str, Any]) -> str:
    """Format the report's figures as a plain-text table, a line per method.

    Times and model calls are multiples of the plain sampler's.
    """
    rows = [COLUMNS, *(_row(entry) for entry in report["runs"])]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    benign = entry["benign"]
    return (
        entry["method"],
        *(_rate(entry, name) for name in SETS),
        f"{benign['identical']:.0%}",
        f"{benign['accuracy']:.0%} (plain {benign['accuracy_plain']:.0%})",
        f"{benign['mean_abs_change']:.3f}",
        f"{entry['seconds_per_image']:.2f}",
        f"x{entry['seconds_ratio']:.2f}",
        f"x{entry['model_calls_ratio']:.2f}",
    )


def _rate(entry: dict[str, Any], name: str) -> str:
    low, high = entry["unsafe_rate_interval"][name]
    return f"{entry['unsafe_rate'][name]:.0%} ({low:.0%}-{high:.0%})"
