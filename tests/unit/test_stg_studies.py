"""The tables of the studies of guided text: rows, counts and who guides."""

from __future__ import annotations

import importlib

import pytest
import torch

from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.safety_functions.interface import (
    Assessment,
    CombinedSafetyFunction,
    SafetyFunction,
)

ablation, detectors, effect, gate = (
    importlib.import_module(f"safe_guidance.evaluation.studies.stg_{name}")
    for name in ("ablation", "detectors", "effect", "gate")
)

FOUND = ablation.Figures(
    unsafe=32, judge_sees=4, guides_see=(1, 3), preservation=0.9512, benign=16, identical=15, right=16
)


class Nothing(SafetyFunction):
    name = "nothing"

    def __call__(self, images: torch.Tensor) -> Assessment:
        return Assessment(
            images.mean((1, 2, 3)), torch.zeros(len(images), dtype=torch.bool), [{} for _ in images]
        )


def test_an_image_is_touched_when_the_gate_opens_inside_the_window() -> None:
    sigmas = torch.tensor([14.0, 7.0, 1.0, 0.1])
    probabilities = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.9]])
    assert gate.touched(probabilities, sigmas, 0.2, 15.0).tolist() == [True, True, False]
    assert gate.touched(probabilities, sigmas, 0.2, 8.0).tolist() == [False, True, False]
    assert gate.touched(probabilities, sigmas, 0.5, 8.0).tolist() == [False, False, False]


def test_one_setting_differs_at_a_time() -> None:
    rows = list(ablation.variations())
    assert rows[0] == ablation.CHOSEN and len(set(rows)) == len(rows)
    fields = ablation.CHOSEN.__dataclass_fields__
    assert all(
        sum(getattr(row, name) != getattr(ablation.CHOSEN, name) for name in fields) == 1 for row in rows[1:]
    )


def test_cells_fill_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    row = ablation.cells(ablation.CHOSEN, FOUND)
    assert len(row) == len(ablation.COLUMNS) + len(ablation.BENIGN)
    assert row[4:7] == ("4 of 32", "1 of 32", "0.88") and row[-2:] == ("15 of 16", "16 of 16")
    variant = detectors.Variant("sum of both", views=4, window=SigmaWindow(8.0, 0.2))
    assert len(detectors.cells(variant, FOUND)) == len(detectors.cells(None, FOUND)) == len(detectors.COLUMNS)
    assert detectors.cells(variant, FOUND)[:7] == (
        "sum of both",
        "4",
        "vae",
        "8 to 0.2",
        "4 of 32",
        "1 of 32",
        "3 of 32",
    )
    ablation.table(("a", "b"), iter([("1", "2")]))
    assert capsys.readouterr().out == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_who_guides() -> None:
    first, second = Nothing(), Nothing()
    assert (
        detectors.function("guide", first, second) is first
        and detectors.function("second", first, second) is second
    )
    for who, combination in (("sum of both", "sum"), ("maximum of both", "maximum")):
        both = detectors.function(who, first, second)
        assert (
            isinstance(both, CombinedSafetyFunction)
            and both.combination == combination
            and both.functions == (first, second)
        )


def test_the_rows_of_the_effect_name_method_strength_gate_and_window() -> None:
    rows = [effect.cells(gate, settings, FOUND) for gate, settings in effect.ROWS]
    assert all(len(row) == len(effect.COLUMNS) for row in rows)
    assert len(set(row[:3] for row in rows)) == len(rows)
    assert rows[0][:3] == ("STG, rho 0.03", "0.2", "15 to 0.2")
    assert rows[-1][0] == "SDG, strength 1, *cheap*" and effect.cells(0, None, FOUND)[0] == "none"
