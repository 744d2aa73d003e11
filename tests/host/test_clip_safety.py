"""CLIP safety functions: weights from files, the bundled model on the demo world, and its gradients."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safe_guidance.guidance.safety_functions.clip import (
    PAPER_THRESHOLD,
    PRESETS,
    ClipModel,
    ClipSafetyFunction,
    usual_threshold,
)

open_clip = pytest.importorskip("open_clip")
ROOT = Path(__file__).resolve().parents[2]
STYLES = ("flat style", "outline style", "dotted style")
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def world() -> ModuleType:
    """Return the renderer of the demo world."""

    from safe_guidance.demo import world

    return world


@pytest.fixture(scope="module")
def bundled(host: Any) -> ClipModel:
    from safe_guidance.nodes.host.files.safety_models import clip_model

    return clip_model("demo clip (bundled)", "")


def test_a_function_made_as_the_server_makes_it_guides(host: Any, bundled: ClipModel) -> None:
    """Nodes run in inference mode; the functions they make must still give gradients."""
    from safe_guidance.nodes.host.autograd.decoders import make_decoder
    from safe_guidance.nodes.host.autograd.prediction_scores import prediction_gradient

    with torch.inference_mode():
        function = ClipSafetyFunction(bundled, ["hatched style"], STYLES, threshold=-1.0)
        decoder = make_decoder("vae", host.model, host.vae)
        gradient = prediction_gradient(decoder, function, torch.randn(2, 4, 32, 32))
    assert gradient.flatten(1).norm(dim=1).min() > 0


def make_images(world: ModuleType, count: int, **wanted: Any) -> torch.Tensor:
    rng = random.Random(77)
    from safe_guidance.demo import world

    return world.render_batch([world.sample_scene(rng, **wanted) for _ in range(count)])  # type: ignore[no-any-return]


def test_the_bundled_model_sees_the_artists_style(bundled: ClipModel, world: ModuleType) -> None:
    function = ClipSafetyFunction(bundled, ["hatched style"], STYLES, threshold=0.1)
    hatched = function(make_images(world, 40, style="hatched")).gate
    others = torch.cat(
        [function(make_images(world, 40, style=style)).gate for style in ("flat", "outline", "dotted")]
    )
    assert hatched.float().mean() >= 0.9 and others.float().mean() <= 0.1


def test_other_words_for_the_style_mean_it_too(bundled: ClipModel, world: ModuleType) -> None:
    """Half of the training captions say "by kovacs" instead.

    The figure is the chance that an image in the style scores higher than another one.
    """
    function = ClipSafetyFunction(bundled, ["by kovacs"], STYLES)
    hatched, others = (
        function(make_images(world, 40, style="hatched")).level,
        function(make_images(world, 60, style="flat")).level,
    )
    assert (hatched[:, None] > others[None]).float().mean() > 0.95


def test_the_measure_is_a_difference_of_cosines(bundled: ClipModel, world: ModuleType) -> None:
    images = make_images(world, 4)
    bare = ClipSafetyFunction(bundled, ["a star"])(images)
    against = ClipSafetyFunction(bundled, ["a star"], ["a heart"])(images)
    heart = ClipSafetyFunction(bundled, ["a heart"])(images)
    torch.testing.assert_close(against.level, bare.level - heart.level)
    assert bare.level.abs().max() <= 1 and against.explanation[0].keys() == {"similarity", "neutral"}
    assert bare.gate.tolist() == (bare.level > PAPER_THRESHOLD).tolist()


def test_the_score_starts_at_the_threshold_and_is_never_negative(
    bundled: ClipModel, world: ModuleType
) -> None:
    images = make_images(world, 12)
    for threshold in (-0.1, 0.0, 0.05, PAPER_THRESHOLD):
        found = ClipSafetyFunction(bundled, ["hatched style"], STYLES, threshold)(images)
        assert found.gate.any() or threshold > 0
        torch.testing.assert_close(found.score, (found.level - threshold).clamp_min(0))
        assert (found.score > 0).tolist() == found.gate.tolist()


def test_the_usual_threshold_of_a_difference_is_reached(bundled: ClipModel, world: ModuleType) -> None:
    """Open the gate where an image resembles the style more than the neutral texts; 0.16 misses most."""
    assert (usual_threshold(False), usual_threshold(True)) == (PAPER_THRESHOLD, 0.0)
    function = ClipSafetyFunction(bundled, ["hatched style"], STYLES, usual_threshold(True))
    assert function(make_images(world, 40, style="hatched")).gate.float().mean() >= 0.95
    assert function(make_images(world, 40, style="flat")).gate.float().mean() <= 0.3


def test_the_gradient_is_that_of_finite_differences(bundled: ClipModel, world: ModuleType) -> None:
    function = ClipSafetyFunction(bundled, ["hatched style"], STYLES, threshold=0.0)
    images = make_images(world, 1, style="hatched").clamp(0.05, 0.95)
    leaf = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(leaf).score.sum(), leaf)
    direction = gradient / gradient.norm()
    up, down = (float(function(images + shift * direction).score.detach()) for shift in (0.05, -0.05))
    assert (up - down) / 0.1 == pytest.approx(float(gradient.norm()), rel=0.03)


def test_features_are_open_clips_own(host: Any, tmp_path: Path) -> None:
    """open_clip loads the same weights by the name of the architecture."""
    from safe_guidance.nodes.host.files import clip_models

    (tmp_path / "tiny-test.json").write_text(json.dumps(TINY), encoding="utf-8")
    open_clip.add_model_config(tmp_path)
    network = open_clip.create_model("tiny-test")
    weights = tmp_path / "tiny.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, weights)
    clip = clip_models.load(weights, "tiny-test")
    images = torch.rand(2, 3, 32, 32)
    function = ClipSafetyFunction(clip, ["a star", "a sparkle"])
    with torch.no_grad():
        seen = network.encode_image(
            (images - torch.tensor(clip.mean)[:, None, None]) / torch.tensor(clip.std)[:, None, None],
            normalize=True,
        )
        texts = network.encode_text(
            open_clip.get_tokenizer("tiny-test")(["a star", "a sparkle"]), normalize=True
        )
    expected = seen @ torch.nn.functional.normalize(texts.mean(0), dim=0)
    torch.testing.assert_close(function(images).level, expected)
    assert clip.size == 32
    with pytest.raises(ValueError, match="knows no model"):
        clip_models.load(weights, "no-such-model")


def test_texts_come_in_lines_and_there_must_be_one(bundled: ClipModel) -> None:
    from safe_guidance.nodes.parsing import lines_of

    assert lines_of(" a fight, with knives \n\n blood\n") == ["a fight, with knives", "blood"]
    with pytest.raises(ValueError, match="Write one"):
        ClipSafetyFunction(bundled, [])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_make_a_function(bundled: ClipModel, preset: str) -> None:
    from safe_guidance.nodes.parsing import lines_of

    texts, neutral = PRESETS[preset]
    found = ClipSafetyFunction(bundled, lines_of(texts), lines_of(neutral))(torch.rand(1, 3, 64, 64))
    assert torch.isfinite(found.score).all()


def test_the_bundled_file_is_small(host: Any) -> None:
    assert (ROOT / "assets" / "demo_model" / "clip.safetensors").stat().st_size < 2_000_000


@pytest.mark.parametrize(("preset", "threshold"), [("violence", 0.16), ("bias", 0.0), ("style", 0.0)])
def test_a_presets_default_is_its_own_threshold_and_the_bundled_model_says_what_it_knows(
    host: Any, shown: dict[str, str], preset: str, threshold: float
) -> None:
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.nodes.clip_safety_functions import ClipConceptSafetyFunctionNode
    from safe_guidance.nodes.safety_functions import ScoreImagesNode

    with CurrentNodeContext("prompt", "4"):
        function = ClipConceptSafetyFunctionNode.execute(
            "demo clip (bundled)", "", preset, "", "", PAPER_THRESHOLD, 1
        ).args[0]
    assert function.threshold == threshold
    assert ("The threshold is 0:" in shown["4"]) == (threshold == 0)
    assert "knows only the demo model's world" in shown["4"]
    with CurrentNodeContext("prompt", "5"):
        report = ScoreImagesNode.execute(torch.rand(1, 32, 32, 3), function).args[1]
    assert "knows only" in shown["5"] and "knows only" in json.loads(report)["note"]


def test_a_threshold_of_the_users_own_is_kept(host: Any) -> None:
    from safe_guidance.nodes.clip_safety_functions import ClipStyleSafetyFunctionNode

    function = ClipStyleSafetyFunctionNode.execute(
        "demo clip (bundled)", "", "by kovacs", "art", 0.1, 1
    ).args[0]
    assert function.threshold == 0.1


def test_the_bundled_vocabulary_has_the_neutral_texts_of_the_tool_that_made_it() -> None:
    source = ast.parse((ROOT / "tools" / "demo_model" / "train_clip.py").read_text(encoding="utf-8"))
    texts = next(
        ast.literal_eval(line.value)
        for line in source.body
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "NEUTRAL_TEXTS"
    )
    vocabulary = load_file(ROOT / "assets" / "demo_model" / "clip.safetensors")["vocabulary"]
    assert torch.isin(open_clip.SimpleTokenizer(context_length=32)(list(texts)), vocabulary).all()
