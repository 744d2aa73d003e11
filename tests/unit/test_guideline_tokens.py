"""Guideline tokens: their file, their optimisation on problems with a known answer, and their calibration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safe_guidance.formats import guideline_token_file as files
from safe_guidance.guidance.detect_and_guide import token_evaluation as evaluation
from safe_guidance.guidance.detect_and_guide import token_losses as losses
from safe_guidance.guidance.detect_and_guide import token_optimization as learn
from safe_guidance.guidance.detect_and_guide.attention_cache import AttentionCache
from safe_guidance.guidance.detect_and_guide.guideline_tokens import (
    GuidelineTokens,
    MapCalibration,
    from_text,
)

WIDTH, HEADS, DIM = 12, 2, 6


def tokens(**changes: object) -> GuidelineTokens:
    embeddings = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    return replace(
        GuidelineTokens(
            embeddings,
            family="SD15",
            words="a star",
            name="stars",
            source="here",
            licence="GPL-3.0-or-later",
            layers=("output.3.0", "middle.0.0"),
            sigmas=(5.0, 1.0),
            calibration=MapCalibration(0.7, 0.1),
            iou=0.5,
        ),
        **changes,  # type: ignore[arg-type]
    )


def cache(images: int = 6, planted: bool = True, safe: int = 2, size: int = 8) -> AttentionCache:
    """Make noise in which one direction of the queries is strong inside a square.

    The last `safe` images lack the square.
    """
    generator = torch.Generator().manual_seed(3)
    masks = torch.zeros(images, size, size, dtype=torch.bool)
    for index in range(images - safe):
        top, left = torch.randint(0, size - 3, (2,), generator=generator).tolist()
        masks[index, top : top + 3, left : left + 3] = True
    direction = torch.randn(WIDTH, generator=generator)
    weight = torch.randn(HEADS * DIM, WIDTH, generator=generator) * WIDTH**-0.5
    aimed = (weight @ direction).view(HEADS, DIM)
    levels = []
    for _ in range(2):
        queries = 0.3 * torch.randn(images, HEADS, size * size, DIM, generator=generator)
        sign = torch.where(masks.flatten(1), 3.0, -3.0)[:, None, :, None]
        levels.append((queries + sign * aimed[None, :, None] / aimed.norm() if planted else queries,))
    return AttentionCache(("output.3.0",), (weight,), tuple(levels), ((size, size),), (5.0, 1.0), masks)


def start(seed: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "stars.safetensors"
    files.save(tokens(), path)
    files.save(tokens(iou=None), path)
    loaded = files.load(path)
    assert torch.equal(loaded.embeddings, tokens().embeddings)
    assert replace(loaded, embeddings=tokens().embeddings).__dict__.keys() == tokens().__dict__.keys()
    for name in ("family", "words", "name", "source", "licence", "layers", "sigmas", "calibration"):
        assert getattr(loaded, name) == getattr(tokens(), name)
    assert loaded.iou is None
    assert [p.name for p in path.parent.iterdir()] == ["stars.safetensors"]


def broken(path: Path, embeddings: torch.Tensor | None = None, **described: object) -> None:
    files.save(tokens(), path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = {
            **file.metadata(),
            "tokens": json.dumps({**json.loads(file.metadata()["tokens"]), **described}),
        }
    save_file(
        {"embeddings": tokens().embeddings if embeddings is None else embeddings}, path, metadata=metadata
    )


def described(path: Path, text: str) -> None:
    metadata = {"format": files.FORMAT, "tokens": text}
    save_file({"embeddings": tokens().embeddings}, path, metadata=metadata)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "another format": (
        lambda p: save_file({"embeddings": torch.zeros(2, 3)}, p, metadata={"format": "x"}),
        "does not hold guideline tokens",
    ),
    "no metadata": (
        lambda p: save_file({"emb_params": torch.zeros(2, 3)}, p),
        "does not hold guideline tokens",
    ),
    "truncated": (lambda p: (files.save(tokens(), p), p.write_bytes(p.read_bytes()[:300])), "is damaged"),
    "not safetensors": (lambda p: p.write_bytes(b"PK\x03\x04pickle"), "is damaged"),
    "huge header": (lambda p: p.write_bytes((2**60).to_bytes(8, "little") + b"{}"), "is damaged"),
    "other tensors": (
        lambda p: save_file({"e": torch.zeros(2, 3)}, p, metadata={"format": files.FORMAT}),
        "do not belong",
    ),
    "no description": (
        lambda p: save_file({"embeddings": torch.zeros(2, 3)}, p, metadata={"format": files.FORMAT}),
        "cannot be read",
    ),
    "one row": (lambda p: broken(p, torch.zeros(1, 4)), "need a background row"),
    "not numbers": (lambda p: broken(p, torch.full((2, 4), torch.nan)), "not finite"),
    "integers": (lambda p: broken(p, torch.zeros(2, 4, dtype=torch.int64)), "not finite 32-bit"),
    "three dimensions": (lambda p: broken(p, torch.zeros(2, 4, 4)), "cannot be used"),
    "layers that do not exist": (lambda p: broken(p, layers=["__class__"]), "layers that no model has"),
    "layers that are no texts": (lambda p: broken(p, layers=[3]), "cannot be read"),
    "a threshold of 2": (
        lambda p: broken(p, calibration={"threshold": 2, "background": 0}),
        "lie between 0 and 1",
    ),
    "a threshold that is no number": (
        lambda p: broken(p, calibration={"threshold": float("nan"), "background": 0}),
        "cannot be read",
    ),
    "an overlap of 3": (lambda p: broken(p, iou=3), "cannot be read"),
    "an overlap that is no number": (lambda p: broken(p, iou=float("nan")), "cannot be read"),
    "a number of 400 digits": (lambda p: broken(p, sigmas=[10**400]), "cannot be read"),
    "a number of 5000 digits": (lambda p: described(p, '{"sigmas": [' + "9" * 5000 + "]}"), "cannot be read"),
    "numbers as texts": (lambda p: broken(p, sigmas=["1"]), "cannot be read"),
    "a truth value": (
        lambda p: broken(p, calibration={"threshold": True, "background": 0}),
        "cannot be read",
    ),
    "layers in one text": (lambda p: broken(p, layers="output.3.0"), "cannot be read"),
    "a list in a list": (lambda p: broken(p, sigmas=[[1.0]]), "cannot be read"),
    "200,000 noise levels": (lambda p: broken(p, sigmas=[1.0] * 200_000), "cannot be read"),
    "a long text": (lambda p: broken(p, words="w" * 2**20), "cannot be read"),
    "deep JSON": (lambda p: described(p, "[" * 100_000), "cannot be read"),
    "deep JSON in an entry": (lambda p: described(p, '{"words":' * 20_000), "cannot be read"),
    "no calibration": (lambda p: broken(p, calibration=None), "cannot be read"),
    "negative noise": (lambda p: broken(p, sigmas=[-1.0]), "noise levels"),
    "a list as description": (
        lambda p: save_file(
            {"embeddings": torch.zeros(2, 3)}, p, metadata={"format": files.FORMAT, "tokens": "[]"}
        ),
        "cannot be read",
    ),
}


@pytest.mark.parametrize(("write", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_refused_in_a_sentence(
    tmp_path: Path, write: Callable[[Path], object], sentence: str
) -> None:
    path = tmp_path / "bad.safetensors"
    write(path)
    with pytest.raises(ValueError, match=sentence) as raised:
        files.load(path)
    assert "bad.safetensors" in str(raised.value)


def test_tokens_that_could_not_be_read_again_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are too long. Shorten them"):
        files.save(tokens(source="s" * 2**20), tmp_path / "new" / "tokens.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_another_family_or_width_are_refused() -> None:
    tokens().check_fits("SD15", WIDTH)
    tokens(family="").check_fits("SDXL", WIDTH)
    with pytest.raises(ValueError, match="were made for SD15, the model is SDXL"):
        tokens().check_fits("SDXL", WIDTH)
    with pytest.raises(ValueError, match="are 12 wide, the model's text embeddings 768"):
        tokens().check_fits("SD15", 768)


def test_tokens_from_text_are_the_start_token_and_the_phrase() -> None:
    hidden = torch.arange(10.0)[:, None].expand(10, 4)
    assert from_text(hidden, hidden[0], 1, 4, "nude person", False).embeddings[:, 0].tolist() == [0, 3]
    assert from_text(hidden, hidden[0], 1, 4, "nude person", True).embeddings[:, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="has no words"):
        from_text(hidden, hidden[0], 1, 1, "", False)


def test_calibration_moves_the_threshold_to_one_half() -> None:
    p = torch.tensor([0.0, 0.35, 0.7, 0.85, 1.0])
    torch.testing.assert_close(MapCalibration(0.7).apply(p), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert MapCalibration(0.5).apply(p) is p


@pytest.mark.parametrize(("map_value", "expected"), [(1.0, 0.31326169), (0.0, 1.31326169)])
def test_the_papers_loss_at_its_ends(map_value: float, expected: float) -> None:
    # Two positions with probabilities 0 and 1 are already normalised.
    p = torch.tensor([map_value, 1 - map_value]).view(1, 1, 1, 2)
    mask = torch.tensor([True, False]).view(1, 1, 2)
    assert float(losses.paper_loss(p, mask)) == pytest.approx(expected, abs=1e-6)


def test_the_papers_loss_of_logits_that_are_equal() -> None:
    """A probability of 1/2 at one position of a map that spans [0, 1] costs log 2."""
    p = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    mask = torch.tensor([False, True, True]).view(1, 1, 3)
    assert float(losses.paper_loss(p, mask)) == pytest.approx((2 * 0.31326169 + 0.69314718) / 3, abs=1e-6)


@pytest.mark.parametrize("recipe", ["paper", "contrast"])
def test_a_planted_direction_is_found(recipe: losses.Recipe) -> None:
    cached = cache()
    found = learn.optimize(
        cached, start(), learn.OptimizationSettings(recipe, iterations=200, levels=2, batch=2)
    )
    maps = evaluation.detections(cached, found.embeddings)
    calibrated = evaluation.calibrate_maps(maps, cached.masks).apply(maps)
    overlaps = evaluation.overlap(calibrated, cached.masks)[:, cached.masks.flatten(1).any(1)]
    assert overlaps.mean() > 0.9
    assert len(found.losses) == 200 and found.losses[-1] < found.losses[0]


@pytest.mark.parametrize("recipe", ["paper", "contrast"])
def test_safe_images_stay_below_one_half(recipe: losses.Recipe) -> None:
    cached = cache(images=6, safe=4)
    found = learn.optimize(
        cached, start(), learn.OptimizationSettings(recipe, iterations=200, levels=2, batch=2)
    )
    assert evaluation.detections(cached, found.embeddings)[:, 2:].max() < 0.5


def test_the_papers_schedule() -> None:
    values = torch.zeros(2, 3, requires_grad=True)
    descent, schedule = learn._optimizer(values, "paper", learn.LEARNING_RATE, 100)
    rates = []
    for _ in range(100):
        rates.append(descent.param_groups[0]["lr"])
        (values.sum() * 0).backward()
        descent.step()
        schedule.step()
    assert rates == pytest.approx([200 * 0.7 ** (i // 20) for i in range(100)])


def test_iterations_follow_the_number_of_images() -> None:
    found = learn.optimize(cache(images=2, safe=1), start(), learn.OptimizationSettings("paper", levels=1))
    assert len(found.losses) == 100


def test_the_same_seed_gives_the_same_tokens() -> None:
    settings = learn.OptimizationSettings(iterations=30, seed=4)
    a, b, c = (
        learn.optimize(cache(), start(), s).embeddings
        for s in (settings, settings, replace(settings, seed=5))
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_watching_sees_every_iteration_and_may_stop_it() -> None:
    seen: list[int] = []

    def watch(iteration: int, iterations: int, loss: float, embeddings: torch.Tensor) -> None:
        seen.append(iteration)
        assert iterations == 30 and embeddings.shape == (2, WIDTH) and not embeddings.requires_grad
        if iteration == 7:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        learn.optimize(cache(), start(), learn.OptimizationSettings(iterations=30), watch)
    assert seen == list(range(8))


def test_a_loss_that_is_no_number_is_tried_again_and_then_explained() -> None:
    bad = cache()
    bad = replace(bad, queries=tuple(tuple(q * torch.nan for q in level) for level in bad.queries))
    with pytest.raises(ValueError, match="The loss is infinite or not a number"):
        learn.optimize(bad, start(), learn.OptimizationSettings(iterations=5))


def test_masks_that_are_empty_are_explained_and_all_ones_do_no_harm() -> None:
    with pytest.raises(ValueError, match="No image has a mask"):
        learn.optimize(cache(images=3, safe=3), start(), learn.OptimizationSettings(iterations=5))
    whole = cache(images=2, safe=0)
    whole = replace(whole, masks=torch.ones_like(whole.masks))
    for recipe in ("paper", "contrast"):
        found = learn.optimize(whole, start(), learn.OptimizationSettings(recipe, iterations=5))  # type: ignore[arg-type]
        assert torch.isfinite(found.embeddings).all()
    assert evaluation.calibrate_maps(
        evaluation.detections(whole, found.embeddings), whole.masks
    ) == MapCalibration(0.5, 0.0)


def test_several_tokens_start_apart() -> None:
    spread = learn.spread_start(start(), 4, seed=0)
    assert spread.shape == (5, WIDTH) and torch.equal(spread[0], start()[0])
    assert len({tuple(row.tolist()) for row in spread[1:]}) == 4
    assert torch.equal(learn.spread_start(start(), 1, seed=0), start())


def test_calibration_separates_images_with_from_without() -> None:
    masks = torch.zeros(4, 3, 3, dtype=torch.bool)
    masks[:2, 1, 1] = True
    maps = torch.full((2, 4, 3, 3), 0.1)
    maps[:, :2, 1, 1] = 0.8
    maps[:, 2:, 0, 0] = 0.6
    found = evaluation.calibrate_maps(maps, masks)
    assert found.threshold == pytest.approx(0.7)
    assert 0 <= found.background < 0.5
    assert evaluation.calibrate_maps(maps[:, :2], masks[:2]).threshold == 0.5


def test_overlap_is_intersection_over_union() -> None:
    masks = torch.tensor([[[True, True, False]], [[False, False, False]]])
    maps = torch.tensor([[[0.9, 0.1, 0.9]], [[0.0, 0.0, 0.0]]])
    overlaps = evaluation.overlap(maps, masks)
    assert overlaps[0].item() == pytest.approx(1 / 3) and torch.isnan(overlaps[1])
