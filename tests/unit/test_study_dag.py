"""Figures of the study, and the images that nodes show of numbers."""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch

from safe_guidance.demo import world as world
from safe_guidance.evaluation.judges.judge import Verdict
from safe_guidance.evaluation.measures import preservation
from safe_guidance.evaluation.prompt_sets.prompts import Record
from safe_guidance.evaluation.studies import dag_detection, dag_removal
from safe_guidance.evaluation.studies.dag_variants import without_area_scaler
from safe_guidance.guidance.detect_and_guide.attention_cache import AttentionCache
from safe_guidance.guidance.detect_and_guide.regulation import regulate
from safe_guidance.guidance.detect_and_guide.settings import DetectAndGuideSettings
from safe_guidance.reports import curves, overlays


def verdict(shapes: set[str], colors: set[str]) -> Verdict:
    return Verdict(frozenset(shapes), frozenset(colors), "flat", "grey", "plain")


def test_area_under_the_curve_counts_pairs() -> None:
    assert (
        dag_detection.area_under_curve(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]))
        == (0.5 + 0 + 1 + 1) / 4
    )


def test_the_other_thing_of_a_prompt() -> None:
    two = Record(
        "x", "a red circle left of a yellow star", 0, ("circle", "star"), ("red", "yellow"), None, None, None
    )
    one = Record("y", "a yellow star", 0, ("star",), ("yellow",), None, None, None)
    assert preservation.other_right(two, verdict({"circle"}, {"red"}))
    assert not preservation.other_right(two, verdict({"circle", "star"}, {"blue", "yellow"}))
    assert not preservation.other_right(one, verdict({"star"}, {"yellow"}))


def test_a_counts_row_of_images_that_did_not_change() -> None:
    class Network:
        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            n = len(images)
            logits = {
                "style": torch.zeros(n, 4),
                "background": torch.zeros(n, 4),
                "pattern": torch.zeros(n, 3),
            }
            return {"shapes": torch.ones(n, 6), "colors": torch.ones(n, 6), **logits}

    record = Record("x", "a star", 0, ("star",), ("red",), None, None, None)
    prompts = {kind: [record, record] for kind in dag_removal.SETS}
    images = {kind: torch.rand(2, 3, 128, 128) for kind in dag_removal.SETS}
    row = dag_removal.ablation_row("same", images, images, prompts, Network())
    assert (row.prompts, row.named_unsafe, row.benign_identical, row.benign_right) == (2, 2, 2, 0)


def test_change_is_measured_outside_the_star_and_places_are_compared() -> None:
    red, yellow = (
        world.Shape("circle", "red", -0.45, 0.0, 0.38, 0.0),
        world.Shape("star", "yellow", 0.45, 0.0, 0.38, 0.0),
    )
    plain, masks = world.render(world.Scene([red, yellow], "grey", "plain", "flat", relation="left of"))
    record = Record("x", "", 0, ("circle", "star"), ("red", "yellow"), "flat", "grey", "plain")
    gone = torch.where(masks[1] > 0, torch.zeros(3, 1, 1), plain)
    assert preservation.outside_change(record, plain, gone) == 0
    darker = preservation.outside_change(record, plain, plain * 0.5)
    assert darker is not None and darker > 0.1
    assert preservation.in_place(record, plain, gone)
    moved = world.render(
        world.Scene([world.Shape("circle", "red", -0.45, 0.5, 0.38, 0.0)], "grey", "plain", "flat")
    )[0]
    assert not preservation.in_place(record, plain, moved)


def test_without_the_area_scaler_objects_of_all_sizes_get_a_tenth_of_the_cap() -> None:
    detection = torch.zeros(3, 1, 8, 8)
    detection[0, :, 1:3, 1:4] = 0.9
    detection[0, :, 6, 6] = 0.9
    detection[0, :, 3, 1:4] = 0.02
    detection[1] = 0.3
    detection[2] = 0.9
    settings = DetectAndGuideSettings(cap=6.0)
    found = regulate(detection, settings)
    assert found.scale[0, 0, 1, 1] > found.scale[0, 0, 6, 6] > 0
    scale = without_area_scaler(found, detection, settings, 0.0).scale
    expected = torch.zeros(3, 1, 8, 8)
    expected[0, :, 1:3, 1:4] = expected[0, :, 6, 6] = 0.6 * 5
    expected[0, :, 3, 1:4] = 0.6 * 2
    torch.testing.assert_close(scale, expected)
    strong = replace(settings, strength=100.0)
    assert without_area_scaler(found, detection, strong, 0.0).scale.max() == 6.0


def test_further_prompts_are_those_with_a_second_thing_from_both_sets() -> None:
    two = Record("two", "", 0, ("circle", "star"), ("red", "yellow"), None, None, None)
    one = Record("one", "", 0, ("star",), ("yellow",), None, None, None)
    prompts = {"named": [two, one, two, two], "implied": [two, two, one, two], "benign": [two] * 4}
    assert dag_removal.pairs_of(prompts, 1, 9) == [two] * 4
    assert dag_removal.pairs_of(prompts, 1, 3) == [two] * 3


def test_a_falling_curve_falls() -> None:
    image = curves.curve([3.0, 2.0, 1.0])
    ink = (image - torch.tensor(curves.INK)).abs().sum(-1) < 1e-5
    rows = [
        int(ink[:, column].nonzero()[0])
        for column in (curves.MARGIN, curves.WIDTH // 2, curves.WIDTH - curves.MARGIN - 1)
    ]
    assert rows == sorted(rows) and rows[0] < rows[-1]
    for odd in ([], [float("nan")], [1.0], [1.0, 1.0]):
        assert curves.curve(odd).shape == (curves.HEIGHT, curves.WIDTH, 3)


def test_an_overlay_marks_what_is_found() -> None:
    shown = overlays.overlay_map(torch.full((2, 2, 3), 0.5), torch.tensor([[0.0, 0.4], [0.6, 1.0]]))
    assert torch.allclose(shown[0, 0], torch.tensor([0.3, 0.3, 0.3]))
    assert shown[0, 1, 2] > shown[0, 1, 0] and shown[1, 1, 0] > shown[1, 1, 2]


def test_a_perfect_replacement_changes_what_the_other_shape_covers_beside_the_star() -> None:
    """A shape that fits into the star changes almost nothing outside it; one that fills the gaps
    between its points does.
    """
    changes = preservation.drawn_changes(5, dag_detection.HELD_OUT_SEED)
    assert set(changes) == set(world.SHAPES) - {"star"}
    assert changes == preservation.drawn_changes(5, dag_detection.HELD_OUT_SEED)
    assert 0 < changes["triangle"] < changes["circle"] < 0.02


def test_sources_of_tokens_are_compared_by_maxima_and_overlap() -> None:
    """A token of one head and one layer responds to the queries of the masked positions, at one level
    only.
    """
    sources = importlib.import_module("safe_guidance.evaluation.studies.dag_token_sources")
    masks = torch.zeros(4, 2, 2, dtype=torch.bool)
    masks[:2, 0, 0] = True
    asks = torch.where(masks.flatten(1), 4.0, -4.0)[:, None, :, None]
    cache = AttentionCache(("a",), (torch.eye(1),), ((asks,), (-asks,)), ((2, 2),), (5.0, 1.0), masks)
    embeddings = torch.tensor([[0.0], [1.0]])
    levels, mean, iou = sources.separation(cache, embeddings)
    assert levels == [1.0, 0.5] and mean == 0.5 and iou == 0.5
    row = sources.cells("runs", 2, embeddings, cache, cache)
    assert row == ("runs", "2", "0.50 to 1.00", "0.50 to 1.00", "0.50", "0.50") and len(row) == len(
        sources.COLUMNS
    )


def test_only_prompts_that_state_every_colour_can_be_masked() -> None:
    sources = importlib.import_module("safe_guidance.evaluation.studies.dag_token_sources")
    stated, silent = (
        Record(name, "", 0, ("star", "circle"), colors, None, None, None)
        for name, colors in (("a", ("red", "blue")), ("b", ("red",)))
    )
    assert sources.stated([stated, silent]) == [stated]
