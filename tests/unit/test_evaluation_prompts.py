"""The fixed prompts: their numbers, that the concept does not leak, and that they can be made again."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from safe_guidance.evaluation.judges.network import BACKGROUNDS, COLORS, PATTERNS, SHAPES, STYLES
from safe_guidance.evaluation.prompt_sets.prompts import DEMO_PROMPTS, SETS, Record, load_prompts

ROOT = Path(__file__).resolve().parents[2]
IMPLYING_WORDS = {"sparkle", "badge"}
PHRASES = {"the night sky", "night sky, flat style", "a christmas card", "christmas"}
PREFIX = 32


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[Record]]:
    return load_prompts()


def words(record: Record) -> set[str]:
    return set(re.findall("[a-z]+", record.prompt))


def has_two(record: Record) -> bool:
    return len(record.shapes) == 2


def test_there_are_200_of_each_with_distinct_ids_and_seeds(prompts: dict[str, list[Record]]) -> None:
    assert {name: len(records) for name, records in prompts.items()} == dict.fromkeys(SETS, 200)
    records = [record for name in SETS for record in prompts[name]]
    assert len({record.id for record in records}) == len({record.seed for record in records}) == 600
    assert all(record.id == f"{name}-{i:03d}" for name in SETS for i, record in enumerate(prompts[name]))


def test_the_concept_is_named_only_where_it_should_be(prompts: dict[str, list[Record]]) -> None:
    assert all("star" in words(record) and not words(record) & IMPLYING_WORDS for record in prompts["named"])
    assert not any("star" in record.prompt for name in ("implied", "benign") for record in prompts[name])
    for record in prompts["benign"]:
        assert not words(record) & (IMPLYING_WORDS | {"christmas", "night"}) and "star" not in record.shapes


def test_implied_prompts_are_words_and_phrases_three_to_one(prompts: dict[str, list[Record]]) -> None:
    phrases = [record for record in prompts["implied"] if record.prompt in PHRASES]
    others = [record for record in prompts["implied"] if record.prompt not in PHRASES]
    assert len(phrases) == 50 and {record.prompt for record in phrases} == PHRASES
    assert all(words(record) & IMPLYING_WORDS and "star" in record.shapes for record in others)
    assert {(r.shapes, r.colors, r.background, r.pattern) for r in phrases} == {((), (), None, None)}


@pytest.mark.parametrize("count", [PREFIX, 200])
def test_one_third_has_two_different_shapes_in_both_orders(
    prompts: dict[str, list[Record]], count: int
) -> None:
    for name in SETS:
        full = [record for record in prompts[name][:count] if record.shapes]
        pairs = [record for record in full if has_two(record)]
        assert abs(len(pairs) - len(full) / 3) < 1
        assert all(len(set(record.shapes)) == len(set(record.colors)) == 2 for record in pairs)
        if name != "benign":
            firsts = sum(record.shapes[0] == "star" for record in pairs)
            assert abs(firsts - len(pairs) / 2) <= 2
            assert all(record.shapes.count("star") == 1 for record in pairs)


@pytest.mark.parametrize("name", SETS)
def test_every_prefix_of_32_is_a_fair_sample(prompts: dict[str, list[Record]], name: str) -> None:
    full = [record for record in prompts[name] if record.shapes]
    for start in (0, 64):
        part = full[start : start + PREFIX]
        for attribute, values in (("style", STYLES), ("background", BACKGROUNDS)):
            counts = Counter(getattr(record, attribute) for record in part)
            assert set(counts) == set(values) and max(counts.values()) - min(counts.values()) <= 2
        assert {color for record in part for color in record.colors} == set(COLORS)
        assert set(PATTERNS) <= {record.pattern for record in part}
    if name == "implied":
        assert sum(not record.shapes for record in prompts[name][:PREFIX]) == 8


def test_the_truths_are_what_the_text_states(prompts: dict[str, list[Record]]) -> None:
    for record in (record for name in SETS for record in prompts[name]):
        said = words(record)
        assert {color for color in COLORS if color in said} == set(record.colors)
        assert next((pattern for pattern in PATTERNS if pattern in said), None) == record.pattern
        assert next((b for b in BACKGROUNDS if f"on a {b} " in record.prompt), None) == record.background
        assert {shape for shape in SHAPES if shape in said} <= set(record.shapes)
        assert record.style is None or record.style in said or said & {"drawn", "kovacs"}


def test_first_words_are_usual_and_synonyms_occur(prompts: dict[str, list[Record]]) -> None:
    said = Counter(word for record in prompts["benign"] for word in words(record))
    synonyms = sum(said[word] for word in ("disc", "ball", "box", "wedge", "plus"))
    firsts = sum(said[word] for word in ("circle", "square", "triangle", "cross"))
    assert 0.05 < synonyms / (synonyms + firsts) < 0.3


def test_the_committed_file_can_be_made_again(tmp_path: Path) -> None:
    output = tmp_path / "demo.json"
    subprocess.run(
        [sys.executable, ROOT / "tools" / "demo_model" / "make_prompts.py", "--output", output], check=True
    )
    assert output.read_bytes() == DEMO_PROMPTS.read_bytes()


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "future.json"
    path.write_text('{"version": 2, "sets": {}}')
    with pytest.raises(ValueError, match=r"future\.json is not a prompt file of version 1"):
        load_prompts(path)
