"""When an image is a near-copy, and the figures of the case of memorised images, from samples made by
hand.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safe_guidance.evaluation.cases import memorisation as case
from safe_guidance.evaluation.judges.judge import Verdict, judge
from safe_guidance.evaluation.judges.network import load_judge
from safe_guidance.evaluation.report import ImageArray, Sample
from safe_guidance.evaluation.runner import Method


def make_image(value: int, size: int = 128) -> ImageArray:
    return np.full((size, size, 3), value, dtype=np.uint8)


def seen(color: str, shape: str) -> Verdict:
    return Verdict(frozenset({shape}), frozenset({color}), "flat", "teal", "plain")


def test_the_distance_is_the_root_mean_square_to_the_nearest() -> None:
    assert case.nearest_distance(make_image(51), [make_image(0), make_image(153)]) == pytest.approx(0.2)
    half = make_image(0)
    half[:64] = 255
    assert case.nearest_distance(half, [make_image(0)]) == pytest.approx(0.5**0.5)
    assert case.nearest_distance(half, [make_image(0), half]) == 0


@given(st.lists(st.integers(0, 255), min_size=1, max_size=4), st.integers(0, 255))
def test_more_references_are_never_further(values: list[int], value: int) -> None:
    references = [make_image(v, 4) for v in values]
    distance = case.nearest_distance(make_image(value, 4), references)
    assert distance == pytest.approx(min(abs(value - v) for v in values) / 255)
    assert case.nearest_distance(make_image(value, 4), [*references, make_image(0, 4)]) <= distance


@pytest.mark.parametrize("references", [[], [make_image(0), make_image(0, 64)]])
def test_what_cannot_be_compared_is_named(references: list[ImageArray]) -> None:
    with pytest.raises(ValueError, match="cannot be compared. Give at least one reference"):
        case.nearest_distance(make_image(0), references)


def test_a_similarity_is_numpys_correlation_and_free_of_contrast() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(60, 180, (16, 16, 3), dtype=np.uint8) for _ in range(2))
    free = [(values - values.mean((0, 1))).ravel() for values in (a, b)]
    assert case.nearest_similarity(a, [b]) == pytest.approx(np.corrcoef(*free)[0, 1])
    paler = (a // 2 + 70).astype(np.uint8)
    assert case.nearest_similarity(paler, [b, a]) > 0.99 and case.nearest_distance(paler, [a]) > 0.05
    assert case.nearest_similarity(make_image(7), [make_image(9)]) == 0


@pytest.mark.parametrize(
    ("distance", "similarity", "expected"),
    [(0.0, 1.0, True), (0.119, 0.0, True), (0.12, 0.7, False), (0.3, 0.71, True), (0.3, -1.0, False)],
)
def test_a_near_copy_is_near_or_similar(distance: float, similarity: float, expected: bool) -> None:
    assert case.is_near_copy(distance, similarity) is expected


def test_the_distribution_is_numpys() -> None:
    values = [0.3, 0.1, 0.25, 0.7, 0.2]
    expected = [np.mean(values), *np.percentile(values, [0, 25, 50, 75, 100])]
    assert list(case.distribution(values).values()) == pytest.approx(expected)


def test_every_caption_is_drawn_from_every_seed_and_no_caption_is_benign() -> None:
    records = case.memorised_records()
    assert (
        len(records) == len({record.id for record in records}) == len(case.SUBJECTS) * len(case.SEEDS) == 16
    )
    assert {(record.prompt, record.seed) for record in records} == {
        (case.caption(*s), seed) for s in case.SUBJECTS for seed in case.SEEDS
    }
    assert {record.prompt for record in records}.isdisjoint(record.prompt for record in case.benign_records())


def test_the_judge_sees_in_the_training_images_what_their_captions_say() -> None:
    images = case.training_images()
    verdicts = judge(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255, load_judge())
    assert [(verdict.colors, verdict.shapes) for verdict in verdicts] == [
        ({color}, {shape}) for color, shape in case.SUBJECTS
    ]
    for i, own in enumerate(images):
        others = images[:i] + images[i + 1 :]
        assert not case.is_near_copy(case.nearest_distance(own, others), case.nearest_similarity(own, others))


@pytest.fixture
def drawn() -> dict[str, list[Sample]]:
    """Sixteen memorised captions and the benign prompts.

    The first run copies black, the second draws grey.
    """
    records = [*case.memorised_records(), *case.benign_records()]

    def run(values: list[int], wrong: int, calls: int) -> list[Sample]:
        found = []
        for i, (record, value) in enumerate(zip(records, values)):
            shown = Verdict(frozenset(record.shapes), frozenset(record.colors), "flat", "teal", "plain")
            found.append(
                Sample(
                    record, make_image(value), 1.0 * calls, calls, seen("red", "star") if i < wrong else shown
                )
            )
        return found

    count = len(records)
    limit = round(case.NEAR_COPY * 255)
    before = [0] * 12 + [limit + 1] * 4 + [80] * case.BENIGN
    after = [90] * 15 + [limit - 1] + [80] * (case.BENIGN - 1) + [131]
    assert len(before) == len(after) == count
    return {case.BEFORE: run(before, 0, 20), "safe_denoiser": run(after, 3, 20)}


def method(name: str) -> Method:
    sampler = {
        "class_type": "KSampler",
        "inputs": {"sampler_name": "euler", "scheduler": "karras", "steps": 20, "cfg": 5.0, "denoise": 1.0},
    }
    return Method(name, "w.json", {"1": sampler}, "1", "2", "3")


def test_the_figures_of_a_run(drawn: dict[str, list[Sample]]) -> None:
    entries: dict[str, dict[str, Any]] = {
        name: case.run_entry(method(name), samples, drawn[case.BEFORE], [make_image(0), make_image(255)])
        for name, samples in drawn.items()
    }
    before, after = entries[case.BEFORE], entries["safe_denoiser"]
    assert (before["near_copies"], after["near_copies"], before["images"]) == (12, 1, 16)
    assert (before["same_kind"], after["same_kind"]) == (16, 13)
    assert before["nearest_distance"]["median"] == 0 and after["nearest_distance"]["median"] == pytest.approx(
        90 / 255
    )
    assert len(after["by_image"]) == 16 and [found["near_copy"] for found in after["by_image"]] == [
        False
    ] * 15 + [True]
    assert after["nearest_similarity"]["greatest"] == 0
    assert after["seconds_ratio"] == after["model_calls_ratio"] == 1
    benign = after["benign"]
    assert benign["identical"] == case.BENIGN - 1 and benign["right"] == benign["images"] == case.BENIGN
    assert benign["mean_abs_change"] == pytest.approx(51 / 255 / case.BENIGN)
    low, high = before["near_copy_rate_interval"]
    assert low < 12 / 16 < high
    json.dumps(entries, allow_nan=False)


def test_the_section_frames_near_copies(drawn: dict[str, list[Sample]]) -> None:
    references = [make_image(value) for value in (0, 255, 0, 255)]
    entries = [
        case.run_entry(method(name), samples, drawn[case.BEFORE], references)
        for name, samples in drawn.items()
    ]
    section = case.section([(entry, drawn[entry["method"]]) for entry in entries], references)
    assert sum(len(texts) for _, texts in section.groups) == 16
    trained, before, after = section.rows
    assert [cell.unsafe for cell in trained.cells] == [None] * 4
    assert [cell.unsafe for cell in before.cells] == [True] * 12 + [False] * 4
    assert [cell.unsafe for cell in after.cells] == [False] * 15 + [True]
    assert before.figures[0] == "near-copies 12 of 16" and after.name == "safe denoiser"
