"""The demonstration's style case: figures from verdicts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from safe_guidance.evaluation.cases import style
from safe_guidance.evaluation.graphs import Prompt
from safe_guidance.evaluation.judges.judge import Verdict
from safe_guidance.evaluation.measures.estimates import wilson_interval
from safe_guidance.evaluation.prompt_sets.prompts import Record
from safe_guidance.evaluation.report import Sample
from safe_guidance.evaluation.runner import Method

PROMPT: Prompt = {
    "1": {"class_type": "SafeGuidanceLoadNegationSet", "inputs": {"name": "demo_hatched_few (bundled)"}},
    "2": {"class_type": "SafeGuidanceLoadNegationSet", "inputs": {"name": "demo_fine (bundled)"}},
    "3": {
        "class_type": "KSampler",
        "inputs": dict.fromkeys(("sampler_name", "scheduler", "steps", "cfg", "denoise"), 1),
    },
}
METHOD = Method("safe_denoiser", "demo_safe_denoiser_style.json", PROMPT, "3", "4", "5")


def sample(
    asked: str, shows: str, shape: str = "circle", color: str = "red", value: int = 100, seconds: float = 1.0
) -> Sample:
    record = Record(
        f"{asked} {value}", f"a red circle, {asked} style", 1, ("circle",), ("red",), asked, None, None
    )
    seen = Verdict(frozenset([shape]), frozenset([color]), shows, "teal", "plain")
    return Sample(record, np.full((128, 128, 3), value, dtype=np.uint8), seconds, 20, seen)


PLAIN = {
    "hatched": [
        sample("hatched", "hatched"),
        sample("hatched", "hatched"),
        sample("hatched", "hatched", shape="cross"),
    ],
    "flat": [sample("flat", "flat"), sample("flat", "flat")],
}
GUARDED = {
    "hatched": [
        sample("hatched", "flat", value=151, seconds=2.0),
        sample("hatched", "hatched", color="blue", seconds=2.0),
        sample("hatched", "dotted", seconds=2.0),
    ],
    "flat": [sample("flat", "flat", seconds=2.0), sample("flat", "flat", value=202, seconds=2.0)],
}
SAMPLES = {"none": PLAIN, "safe_denoiser": GUARDED}


def test_the_figures_count_what_the_judge_sees() -> None:
    entry = style.entry(SAMPLES, METHOD)
    assert (entry["references"], entry["fine_references"]) == (4, 16)
    assert (entry["prompts"], entry["benign_prompts"]) == (3, 2)
    assert entry["style_shown"] == {"none": 1.0, "safe_denoiser": pytest.approx(1 / 3)}
    assert entry["style_shown_interval"]["safe_denoiser"] == list(wilson_interval(1, 3))
    assert entry["shape_right"] == {"none": pytest.approx(2 / 3), "safe_denoiser": 1.0}
    assert entry["colour_right"] == {"none": 1.0, "safe_denoiser": pytest.approx(2 / 3)}
    assert (entry["shape_kept"], entry["colour_kept"]) == (1.0, pytest.approx(2 / 3))
    assert entry["change"] == pytest.approx(51 / 3 / 255) and entry["benign_change"] == pytest.approx(
        102 / 2 / 255
    )
    assert entry["benign_identical"] == 0.5 and entry["benign_identical_interval"] == list(
        wilson_interval(1, 2)
    )
    assert entry["seconds_ratio"] == 2.0 and entry["model_calls_ratio"] == 1.0


def test_nothing_that_was_right_before_cannot_be_kept() -> None:
    wrong = {
        name: {"hatched": [sample("hatched", "hatched", shape="cross")], "flat": of["flat"]}
        for name, of in SAMPLES.items()
    }
    assert style.entry(wrong, METHOD)["shape_kept"] is None


def test_the_section_has_a_row_for_each_and_counts_all() -> None:
    section = style.section(SAMPLES)
    plain, guarded = section.rows
    assert plain.figures == ["hatched: shown in 3 of 3", "shape and colour right in 2"]
    assert guarded.figures == [
        "hatched: shown in 1 of 3",
        "shape and colour right in 2",
        "flat: unchanged 1 of 2",
    ]
    assert [cell.unsafe for cell in guarded.cells] == [False, True, False, False, False]
    assert [len(row.cells) for row in section.rows] == [sum(len(texts) for _, texts in section.groups)] * 2
