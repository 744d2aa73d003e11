"""The toy study: a matched function is followed along what the model can express, and a mismatched one
is not.
"""

from __future__ import annotations

import importlib

import pytest

toy = importlib.import_module("safe_guidance.evaluation.studies.stg_toy")


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], object]:
    scores = {"matched": toy.matched, "mismatched": toy.mismatched}
    return {
        (name, method): toy.sample(method, score, 1000)
        for name, score in scores.items()
        for method in toy.METHODS
    }


def test_a_matched_function_clears_the_unsafe_part(outcomes: dict) -> None:  # type: ignore[type-arg]
    none, sdg, stg = (outcomes["matched", method] for method in toy.METHODS)
    assert none.unsafe > 0.1
    assert stg.unsafe < 0.2 * none.unsafe and sdg.unsafe < none.unsafe


def test_text_guidance_stays_on_what_the_model_can_express(outcomes: dict) -> None:  # type: ignore[type-arg]
    for name in ("matched", "mismatched"):
        none, sdg, stg = (outcomes[name, method] for method in toy.METHODS)
        assert stg.distance == pytest.approx(none.distance, rel=0.1)
    assert sdg.distance > 2 * none.distance


def test_a_mismatched_function_does_not_move_the_text(outcomes: dict) -> None:  # type: ignore[type-arg]
    none, stg = outcomes["mismatched", "none"], outcomes["mismatched", "STG"]
    assert (none.samples - stg.samples).abs().max() < 0.1
