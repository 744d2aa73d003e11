"""Safety functions: classifier, combination and views, in closed form; frames around findings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_guidance.guidance.safety_functions.classifier import ClassifierSafetyFunction
from safe_guidance.guidance.safety_functions.classifier_network import ConvClassifier
from safe_guidance.guidance.safety_functions.interface import (
    Assessment,
    CombinedSafetyFunction,
    Region,
    SafetyFunction,
)
from safe_guidance.guidance.safety_functions.multi_view import Views, view
from safe_guidance.reports.overlays import SAFE, UNSAFE, overlay_regions
from safe_guidance.reports.safety_scores import scores_in_words


class Channel(SafetyFunction):
    """Safety function whose score is the mean of one colour."""

    def __init__(self, channel: int, threshold: float = 0.5) -> None:
        self.channel, self.threshold, self.name = channel, threshold, "rgb"[channel]
        self.networks = [torch.nn.Identity()]

    def __call__(self, images: Tensor) -> Assessment:
        score = images[:, self.channel].mean((1, 2))
        regions = [
            [Region(self.name, float(s), (0.0, 0.0, 1.0, 1.0))] if s > self.threshold else [] for s in score
        ]
        return Assessment(
            score, score > self.threshold, [{"mean": round(float(s), 3)} for s in score], regions
        )


def colors(*rgb: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rgb)[:, :, None, None].expand(-1, 3, 16, 16).contiguous()


@given(st.floats(0, 3), st.floats(0, 3))
def test_sum_and_maximum_of_weighted_scores(first: float, second: float) -> None:
    images = colors((0.2, 0.6, 0.0), (0.9, 0.1, 0.0))
    for combination, expected in (
        ("sum", [0.2 * first + 0.6 * second, 0.9 * first + 0.1 * second]),
        ("maximum", [max(0.2 * first, 0.6 * second), max(0.9 * first, 0.1 * second)]),
    ):
        combined = CombinedSafetyFunction([Channel(0), Channel(1)], [first, second], combination)  # type: ignore[arg-type]
        found = combined(images)
        assert found.score.tolist() == pytest.approx(expected, abs=1e-5)
        assert found.gate.tolist() == [second > 0, first > 0]


def test_a_combination_tells_who_found_what_where() -> None:
    combined = CombinedSafetyFunction([Channel(0), Channel(1)], [1, 1])
    found = combined(colors((0.9, 0.8, 0.0), (0.1, 0.7, 0.0)))
    assert found.explanation == [
        {"r": {"mean": 0.9}, "g": {"mean": 0.8}},
        {"r": {"mean": 0.1}, "g": {"mean": 0.7}},
    ]
    assert [[region.label for region in found.regions_of(i)] for i in (0, 1)] == [["r", "g"], ["g"]]
    assert combined.name == "r + g" and len(combined.networks) == 2


def test_a_negative_measure_does_not_lower_a_sum() -> None:
    class Below(Channel):
        def __call__(self, images: Tensor) -> Assessment:
            found = super().__call__(images)
            return Assessment(found.score, found.gate, found.explanation, measure=found.score - 0.5)

    images = colors((0.9, 0.2, 0.0))
    one = Channel(0)(images)
    both = CombinedSafetyFunction([Channel(0), Below(1)], [1, 1])(images)
    assert both.level.tolist() == one.level.tolist(), "0.2 - 0.5 counts as 0"
    assert both.score.item() == pytest.approx(1.1)

    class Negative(Channel):
        def __call__(self, images: Tensor) -> Assessment:
            found = super().__call__(images)
            return Assessment(found.score - 0.5, found.gate, found.explanation)

    for combination in ("sum", "maximum"):
        both = CombinedSafetyFunction([Channel(0), Negative(1)], [1, 1], combination)  # type: ignore[arg-type]
        found = both(images)
        assert found.score.tolist() == one.score.tolist()


def test_what_is_read_is_the_measure_through_views_and_combinations() -> None:
    class Excess(Channel):
        note = "Knows one colour."

        def __call__(self, images: Tensor) -> Assessment:
            found = super().__call__(images)
            excess = (found.score - self.threshold).clamp_min(0)
            return Assessment(excess, found.gate, found.explanation, measure=found.score)

    images = colors((0.7, 0.2, 0.0), (0.4, 0.2, 0.0))
    for function in (Excess(0), Views(Excess(0), 3), CombinedSafetyFunction([Excess(0), Excess(0)], [1, 0])):
        found = function(images)
        assert found.score.tolist() == pytest.approx([0.2, 0])
        assert found.level.tolist() == pytest.approx([0.7, 0.4])
        assert "unsafe, score 0.7" in scores_in_words(found) and function.note == "Knows one colour."


def test_one_function_of_weight_1_is_itself() -> None:
    images = colors((0.2, 0.6, 0.4))
    one, alone = CombinedSafetyFunction([Channel(1)], [1.0])(images), Channel(1)(images)
    assert torch.equal(one.score, alone.score) and torch.equal(one.gate, alone.gate)


def test_combinations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="Connect at least one"):
        CombinedSafetyFunction([], [])
    with pytest.raises(ValueError, match="one for each"):
        CombinedSafetyFunction([Channel(0)], [1.0, 2.0])


def classifier() -> ConvClassifier:
    torch.manual_seed(0)
    return (
        ConvClassifier({"shapes": ["circle", "star"], "style": ["flat"]}, widths=(8, 16), size=16)
        .requires_grad_(False)
        .eval()
    )


def test_a_classifiers_score_is_minus_the_log_of_being_safe() -> None:
    network, images = classifier(), torch.rand(3, 3, 32, 32)
    found = ClassifierSafetyFunction(network, "shapes", ["star", "circle"], threshold=0.5)(images)
    probabilities = network(images)["shapes"].sigmoid()
    torch.testing.assert_close(found.score, -torch.log1p(-probabilities).sum(1))
    assert found.gate.tolist() == (probabilities >= 0.5).any(1).tolist()
    assert found.explanation[0] == {
        "star": pytest.approx(float(probabilities[0, 1])),
        "circle": pytest.approx(float(probabilities[0, 0])),
    }


@pytest.mark.parametrize("sure", [1.0, 30.0, 1000.0])
def test_a_sure_classifier_still_has_a_gradient(sure: float) -> None:
    class Sure(torch.nn.Module):
        heads = {"classes": ("bad",)}

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"classes": (sure * images.mean((1, 2, 3)))[:, None]}

    images = torch.full((1, 3, 8, 8), 0.9, requires_grad=True)
    score = ClassifierSafetyFunction(Sure(), "classes", ["bad"])(images).score  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert math.isfinite(float(score.detach())) and gradient.sum() > 0.5 * sure


@pytest.mark.parametrize(
    ("head", "classes", "message"),
    [("shape", ["star"], "no output"), ("shapes", ["moon"], "does not know"), ("shapes", [], "Choose")],
)
def test_unknown_outputs_and_classes_are_refused(head: str, classes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierSafetyFunction(classifier(), head, classes)


def test_images_are_judged_one_by_one() -> None:
    images = torch.rand(3, 3, 32, 32)
    for function in (ClassifierSafetyFunction(classifier(), "shapes", ["star"]), Views(Channel(0), 5)):
        together = function(images)
        alone = [function(images[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(together.score, torch.cat([part.score for part in alone]))
        assert together.gate.tolist() == [bool(part.gate) for part in alone]


def test_views_differ_and_are_always_the_same() -> None:
    images, state = torch.rand(1, 3, 32, 48), torch.get_rng_state()
    seen = [view(images, number) for number in range(1, 8)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(v.shape == images.shape for v in seen)
    assert all(torch.equal(v, view(images, number)) for number, v in enumerate(seen, 1))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_views_of_a_plain_image_agree_and_half_of_them_open_the_gate() -> None:
    plain = Views(Channel(0), 6)(colors((0.7, 0.0, 0.0), (0.3, 0.0, 0.0)))
    assert plain.score.tolist() == [pytest.approx(0.7), pytest.approx(0.3)] and plain.gate.tolist() == [
        True,
        False,
    ]

    # A dot that only the unmoved view has at the place that the function looks at.
    class Centre(Channel):
        def __call__(self, images: Tensor) -> Assessment:
            return super().__call__(images[..., 32:33, 32:33])

    dot = torch.zeros(1, 3, 64, 64)
    dot[..., 32, 32] = 1
    assert bool(Centre(0)(dot).gate) and not bool(Views(Centre(0), 6)(dot).gate)


def test_an_overlay_frames_the_image_in_the_verdicts_colour() -> None:
    image = torch.full((64, 96, 3), 0.5)
    for unsafe, color in ((True, UNSAFE), (False, SAFE)):
        framed = overlay_regions(image, [], unsafe)
        assert framed.shape == image.shape
        torch.testing.assert_close(framed[0, 0], torch.tensor(color) / 255)
        assert torch.allclose(framed[32, 48], image[32, 48], atol=0.01)
    boxed = overlay_regions(image, [Region("thing", 0.9, (0.25, 0.25, 0.75, 0.75))], True)
    torch.testing.assert_close(boxed[16, 48], torch.tensor(UNSAFE) / 255)
    # Corners outside the image, or the wrong way round, do no harm.
    assert overlay_regions(image, [Region("thing", 0.9, (-1.0, 0.9, 2.0, 0.1))], True).shape == image.shape


def test_a_label_can_be_read_on_every_image() -> None:
    for shade in (0.0, 1.0):
        labelled = overlay_regions(
            torch.full((256, 256, 3), shade), [Region("thing", 0.9, (0.25, 0.25, 0.75, 0.75))], True
        )
        ground = (labelled[65:75, 66:90] - torch.tensor(UNSAFE) / 255).abs().amax(-1) < 0.01
        letters = (labelled[65:75, 66:90] > 0.95).all(-1)
        assert ground.any() and letters.any()


def test_an_assessment_in_words() -> None:
    found = Assessment(
        torch.tensor([0.5, 2.0]),
        torch.tensor([False, True]),
        [{}, {}],
        [[], [Region("thing", 0.9, (0, 0, 1, 1))]],
    )
    assert scores_in_words(found) == "image 1: safe, score 0.5\nimage 2: unsafe, score 2 (thing 0.90)"
