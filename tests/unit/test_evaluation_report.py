"""Figures and images of an evaluation, from verdicts made by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from safe_guidance.evaluation import method_sheet, report
from safe_guidance.evaluation.demo import METHODS
from safe_guidance.evaluation.judges.judge import Verdict, judge, matches
from safe_guidance.evaluation.judges.network import HEADS
from safe_guidance.evaluation.measures.estimates import wilson_interval
from safe_guidance.evaluation.prompt_sets.prompts import SETS, Record
from safe_guidance.evaluation.report import MethodRun, Sample


def record(key: str, shapes: tuple[str, ...] = ("circle",), colors: tuple[str, ...] = ("red",)) -> Record:
    return Record(
        key, f"an image of {key} with a rather long text about it", 1, shapes, colors, "flat", "teal", "plain"
    )


def verdict(shapes: str = "circle", colors: str = "red") -> Verdict:
    return Verdict(frozenset(shapes.split()), frozenset(colors.split()), "flat", "teal", "plain")


def make_image(value: int, size: int = 128) -> report.ImageArray:
    return np.full((size, size, 3), value, dtype=np.uint8)


def sample(
    key: str, value: int = 100, seconds: float = 1.0, calls: int = 20, seen: Verdict | None = None
) -> Sample:
    return Sample(record(key), make_image(value), seconds, calls, seen or verdict())


STAR = verdict("star")
PLAIN = MethodRun(
    "none",
    "plain.json",
    {},
    {
        "named": [sample("n0", seen=STAR), sample("n1", seen=STAR), sample("n2", seen=STAR), sample("n3")],
        "implied": [sample("i0", seen=STAR), sample("i1", seen=STAR)],
        "benign": [sample("b0"), sample("b1"), sample("b2"), sample("b3", seen=verdict("circle", "blue"))],
    },
)
METHOD = MethodRun(
    "guard",
    "guard.json",
    {"cfg": 5.0},
    {
        "named": [
            sample("n0", 90, 3.0, 40, STAR),
            sample("n1", 90, 3.0, 40),
            sample("n2", 90, 3.0, 40),
            sample("n3", 90, 3.0, 40),
        ],
        "implied": [sample("i0", 90, 2.0, 30), sample("i1", 90, 2.0, 30)],
        "benign": [
            sample("b0"),
            sample("b1", 151),
            sample("b2", seen=verdict("circle heart")),
            sample("b3", seen=STAR),
        ],
    },
)


def test_the_figures_of_a_method() -> None:
    entry = report.run_entry(METHOD, PLAIN)
    assert entry == {
        "method": "guard",
        "workflow": "guard.json",
        "settings": {"cfg": 5.0},
        "counts": {"named": 4, "implied": 2, "benign": 4},
        "unsafe_rate": {"named": 0.25, "implied": 0.0, "benign": 0.25},
        "unsafe_rate_interval": {
            "named": list(wilson_interval(1, 4)),
            "implied": list(wilson_interval(0, 2)),
            "benign": list(wilson_interval(1, 4)),
        },
        "benign": {
            "identical": 0.75,
            "accuracy": 0.5,
            "accuracy_plain": 0.75,
            "mean_abs_change": pytest.approx(51 / 255 / 4),
        },
        "seconds_per_image": pytest.approx((4 * 3 + 2 * 2 + 4) / 10),
        "seconds_ratio": 2.0,
        "model_calls_per_image": pytest.approx((4 * 40 + 2 * 30 + 4 * 20) / 10),
        "model_calls_ratio": pytest.approx(1.5),
    }


def test_the_plain_sampler_beside_itself_changes_and_costs_nothing() -> None:
    entry = report.run_entry(PLAIN, PLAIN)
    assert entry["benign"] == {
        "identical": 1.0,
        "accuracy": 0.75,
        "accuracy_plain": 0.75,
        "mean_abs_change": 0.0,
    }
    assert entry["seconds_ratio"] == entry["model_calls_ratio"] == 1.0
    assert entry["unsafe_rate"] == {"named": 0.75, "implied": 1.0, "benign": 0.0}


def test_runs_on_different_prompts_are_not_compared() -> None:
    other = MethodRun("other", "", {}, {**PLAIN.samples, "named": [sample("x"), *PLAIN.samples["named"][1:]]})
    with pytest.raises(ValueError, match="different prompts"):
        report.run_entry(other, PLAIN)
    empty = MethodRun("empty", "", {}, {**PLAIN.samples, "benign": []})
    with pytest.raises(ValueError, match="without images"):
        report.run_entry(empty, empty)


def test_the_report_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    content = report.build_report({"comfyui": "1"}, {"name": "demo"}, [PLAIN, METHOD])
    path = tmp_path / "report.json"
    path.write_text("old")
    report.write_json(path, content)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text()) == content
    assert [entry["method"] for entry in content["runs"]] == ["none", "guard"]
    assert (content["version"], content["host"], content["model"]) == (1, {"comfyui": "1"}, {"name": "demo"})


@pytest.mark.parametrize("content", [{"bad": float("nan")}, {"bad": object()}])
def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises((TypeError, ValueError)):
        report.write_json(path, content)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_the_table_has_a_line_for_each_method() -> None:
    lines = report.table(report.build_report({}, {}, [PLAIN, METHOD])).splitlines()
    assert [line.split()[0] for line in lines] == ["method", "none", "guard"]
    assert "25% (5%-70%)" in lines[2] and "50% (plain 75%)" in lines[2] and "x1.50" in lines[2]


def cell_colors(sheet: Image.Image, top: int, column: int, groups_before: int = 0) -> list[Any]:
    """Return the colours of a cell's frame, of its image's middle, and of its change's middle."""
    left = (
        method_sheet.MARGIN
        + method_sheet.LABEL_WIDTH
        + column * method_sheet.COLUMN
        + groups_before * method_sheet.GROUP_GAP
    )
    middle = method_sheet.CELL // 2
    change = top + method_sheet.CELL + method_sheet.GAP // 2 + method_sheet.CHANGE // 2
    return [
        sheet.getpixel(point)
        for point in ((left, top), (left + middle, top + middle), (left + middle, change))
    ]


FIRST_ROW = (
    method_sheet.MARGIN + method_sheet.LEGEND_HEIGHT + method_sheet.TITLE_HEIGHT + method_sheet.HEADING_HEIGHT
)
SECOND_ROW = FIRST_ROW + method_sheet.CELL + method_sheet.ROW_GAP


def test_the_contact_sheet_frames_by_verdict_and_amplifies_the_change() -> None:
    sheet = method_sheet.method_sheet([PLAIN, METHOD], examples=3)
    grey, darker, change = (100,) * 3, (90,) * 3, (10 * method_sheet.AMPLIFICATION,) * 3
    assert cell_colors(sheet, FIRST_ROW, 0)[:2] == [method_sheet.UNSAFE, grey]
    assert cell_colors(sheet, SECOND_ROW, 0) == [method_sheet.UNSAFE, darker, change]
    assert cell_colors(sheet, SECOND_ROW, 1) == [method_sheet.SAFE, darker, change]
    # The implied set has two images, so the benign ones begin with the sixth column.
    assert cell_colors(sheet, SECOND_ROW, 6, groups_before=2) == [method_sheet.SAFE, (151,) * 3, (204,) * 3]


def test_the_contact_sheet_counts_all_images_and_shows_few() -> None:
    section = method_sheet.method_section([PLAIN, METHOD], examples=1)
    plain, method = section.rows
    assert [len(texts) for _, texts in section.groups] == [1, 1, 1] and len(method.cells) == 3
    assert plain.name == "plain sampler" and not any("unchanged" in line for line in plain.figures)
    assert method.figures == [
        "named: unwanted in 1 of 4",
        "implied: unwanted in 0 of 2",
        "benign: unwanted in 1 of 4",
        "benign: unchanged 3 of 4",
    ]


def test_a_sheet_of_all_methods_fits_a_screen_or_two() -> None:
    many = {name: PLAIN.samples["named"] * 10 for name in SETS}
    runs = [MethodRun(name, "", {}, many) for name in METHODS]
    width, height = method_sheet.method_sheet(runs).size
    assert width < 2400 and height < 4000
    assert method_sheet.method_sheet(runs[:4]).height < 1000


def test_further_sections_stand_below() -> None:
    cells = [
        method_sheet.Cell(make_image(100), True),
        method_sheet.Cell(make_image(90), None, make_image(100)),
    ]
    section = method_sheet.Section(
        "Styles", [("hatched", ["a heart", "a box"])], [method_sheet.Row("guard", ["1 of 2"], cells)]
    )
    alone, both = (method_sheet.method_sheet([PLAIN], further) for further in ([], [section]))
    assert both.height == alone.height + method_sheet.SECTION_GAP + method_sheet._height(section)
    top = both.height - method_sheet.MARGIN - method_sheet._row_height(section.rows[0]) + method_sheet.ROW_GAP
    assert cell_colors(both, top, 0)[:2] == [method_sheet.UNSAFE, (100,) * 3]
    assert cell_colors(both, top, 1) == [
        method_sheet.NEUTRAL,
        (90,) * 3,
        (10 * method_sheet.AMPLIFICATION,) * 3,
    ]


def test_a_difference_does_not_wrap_around() -> None:
    assert (method_sheet.difference(make_image(0), make_image(255)) == 255).all()
    assert (method_sheet.difference(make_image(255), make_image(250)) == 5 * method_sheet.AMPLIFICATION).all()
    assert report.mean_abs_change(make_image(0), make_image(255)) == 1.0


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        (verdict("circle heart", "red blue"), True),
        (verdict("circle", "red blue"), False),
        (verdict("circle heart star", "red blue"), False),
        (verdict("circle heart", "red"), False),
        (verdict("circle heart", "red blue white"), False),
    ],
)
def test_a_match_shows_all_that_is_stated_and_nothing_else(seen: Verdict, right: bool) -> None:
    assert matches(seen, record("x", ("heart", "circle"), ("blue", "red"))) is right


class Oracle(nn.Module):
    """Network that reads its logits from the images' first pixels."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        sizes = [len(classes) for classes in HEADS.values()]
        return dict(zip(HEADS, (images[:, 0, 0, : sum(sizes)] - 0.5).split(sizes, dim=1)))


def test_the_judge_reads_every_head_in_order() -> None:
    names = [name for classes in HEADS.values() for name in classes]
    images = torch.full((40, 3, 128, 128), 0.2)
    for seen in ("star", "heart", "white", "hatched", "brown", "checkered"):
        images[39, 0, 0, names.index(seen)] = 0.9
    verdicts = judge(images, Oracle())
    assert len(verdicts) == 40
    assert verdicts[39] == Verdict(
        frozenset({"star", "heart"}), frozenset({"white"}), "hatched", "brown", "checkered"
    )
    assert verdicts[39].unsafe and not verdicts[0].unsafe and verdicts[0].shapes == frozenset()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 64, 64), "cannot be judged"),
        (torch.zeros(3, 128, 128), "cannot be judged"),
        (torch.full((1, 3, 128, 128), 255.0), re.escape("outside [0, 1]")),
        (torch.full((1, 3, 128, 128), torch.nan), re.escape("outside [0, 1]")),
    ],
)
def test_the_judge_refuses_what_is_no_image(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(images, Oracle())
