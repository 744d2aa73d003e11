"""All methods on one model: identity, order, forwards, masks and batches, together."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from demo_prompts import HEART, STAR
from safe_guidance.formats.negation_set import from_images
from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration
from safe_guidance.guidance.detect_and_guide.settings import DetectAndGuideSettings
from safe_guidance.guidance.safe_data_guidance import SafeDataGuidanceSettings
from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserSettings
from safe_guidance.guidance.safe_latent_diffusion import SafeLatentDiffusionSettings
from safe_guidance.guidance.safe_text_guidance import SafeTextGuidanceSettings
from safe_guidance.guidance.safety_functions.interface import Assessment, SafetyFunction
from safe_guidance.guidance.semantic_guidance import Concept, SemanticGuidanceSettings
from safe_guidance.guidance.spell import SpellSettings

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

EVERY_STEP = SigmaWindow()
METHODS = ("Safe Denoiser", "SPELL", "STG", "SDG", "DAG", "SLD", "Semantic Guidance")
TEXT_METHODS = ("DAG", "SLD", "Semantic Guidance")


class Brightness(SafetyFunction):
    """Safety function that finds bright images unsafe: all, or those in the given rows of the batch."""

    name = "brightness"

    def __init__(self, rows: Sequence[bool] | None = None) -> None:
        self.rows = rows

    def __call__(self, images: Tensor) -> Assessment:
        whole = self.rows is not None and len(images) == len(self.rows)
        gate = torch.tensor(self.rows) if whole else torch.ones(len(images), dtype=torch.bool)
        return Assessment(images.mean((1, 2, 3)), gate, [{} for _ in images])


Attach = Callable[..., Any]


@pytest.fixture
def attach(host: Any) -> Attach:
    """Return a function that attaches a method which acts at every step, or has strength zero."""
    from safe_guidance.nodes.host.engine import hooks
    from safe_guidance.nodes.host.methods.detect_and_guide import DetectAndGuideCorrection
    from safe_guidance.nodes.host.methods.safe_data_guidance import SafeDataGuidanceCorrection
    from safe_guidance.nodes.host.methods.safe_denoiser import SafeDenoiserCorrection
    from safe_guidance.nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection
    from safe_guidance.nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection
    from safe_guidance.nodes.host.methods.semantic_guidance import SemanticGuidanceCorrection
    from safe_guidance.nodes.host.methods.spell import SpellCorrection

    images = from_images(torch.rand(4, 128, 128, 3, generator=torch.Generator().manual_seed(1)))
    rows = host.text("a star")[0][0][0, 1:3]
    tokens = GuidelineTokens(rows.float().clone(), calibration=MapCalibration(0.011))
    detects = {"coverage": 2.0, "detection_threshold": 0.0, "edit_threshold": 0.0, "window": EVERY_STEP}

    def correction(name: str, on: float, judge: SafetyFunction) -> Any:
        star = host.text("star")
        if name == "Safe Denoiser":
            settings = SafeDenoiserSettings(mode="tempered", strength=0.5 * on, window=EVERY_STEP)
            return SafeDenoiserCorrection(images, host.vae, settings)
        if name == "SPELL":
            return SpellCorrection(images, host.vae, SpellSettings(radius=5.0 * on))
        if name == "STG":
            return SafeTextGuidanceCorrection(
                host.vae, judge, SafeTextGuidanceSettings(rho=0.02 * on, tau=-1e9, window=EVERY_STEP)
            )
        if name == "SDG":
            return SafeDataGuidanceCorrection(
                host.vae, judge, SafeDataGuidanceSettings(strength=0.1 * on, tau=-1e9, window=EVERY_STEP)
            )
        if name == "DAG":
            return DetectAndGuideCorrection([tokens], star, DetectAndGuideSettings(strength=on, **detects))
        if name == "SLD":
            return SafeLatentDiffusionCorrection(
                star, SafeLatentDiffusionSettings(1000.0 * on, window=EVERY_STEP)
            )
        concept = Concept(scale=2.0 * on, window=EVERY_STEP)
        return SemanticGuidanceCorrection([star], SemanticGuidanceSettings((concept,)))

    def attached(model: Any, *names: str, on: float = 1.0, judge: SafetyFunction | None = None) -> Any:
        for name in names:
            model = hooks.attach(model, correction(name, on, judge or Brightness()))
        return model

    return attached


def sample(host: Any, model: Any, *prompts: str, **options: Any) -> Tensor:
    options = {"steps": 3, "sampler": "euler", **options}
    return host.sample(model, host.text(*(prompts or (STAR,))), **options)


def test_all_methods_at_strength_zero_are_the_identity_and_cost_nothing(host: Any, attach: Attach) -> None:
    plain, plain_rows = host.count_calls(host.model)
    baseline = sample(host, plain)
    counted, rows = host.count_calls(attach(host.model, *METHODS, on=0.0))
    assert torch.equal(sample(host, counted), baseline) and rows == plain_rows


@pytest.mark.parametrize("name", METHODS)
def test_a_method_at_zero_beside_one_that_acts_changes_no_bit(host: Any, attach: Attach, name: str) -> None:
    other = "SLD" if name != "SLD" else "SPELL"
    alone = sample(host, attach(host.model, other))
    beside = attach(attach(host.model, name, on=0.0), other)
    assert torch.equal(sample(host, beside), alone)
    assert not torch.equal(alone, sample(host, attach(host.model, other, name))), (
        "the method must act when it is on"
    )


@pytest.mark.parametrize("pair", list(itertools.combinations(METHODS, 2)), ids=" + ".join)
def test_two_methods_in_either_order_give_the_same_image(
    host: Any, attach: Attach, pair: tuple[str, str]
) -> None:
    options = {"steps": 2}
    assert torch.equal(
        sample(host, attach(host.model, *pair), **options),
        sample(host, attach(host.model, *pair[::-1]), **options),
    )


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_any_subset_in_any_order_gives_the_same_image(host: Any, attach: Attach, size: int) -> None:
    """Combine with SAFREE's text and its re-attention. Other tests combine the other methods."""
    from safe_guidance.nodes.host.engine.hooks import attach as attach_correction
    from safe_guidance.nodes.host.methods.safree import filter_text
    from safe_guidance.nodes.host.methods.safree_reattention import ReattentionCorrection

    filtered = filter_text(host.clip, STAR, ["star"], 0.01, None)

    def image(names: Sequence[str]) -> Tensor:
        model = host.model
        for name in names:
            reattention = ReattentionCorrection(filtered.plain, 0.9, 0.2)
            model = attach_correction(model, reattention) if name == "SAFREE" else attach(model, name)
        return host.sample(model, filtered.conditioning, steps=2, sampler="euler")

    for seed in range(3):
        chosen = random.Random(10 * size + seed)
        names = [*chosen.sample(METHODS, size - 1), "SAFREE"]
        first = image(names)
        assert torch.isfinite(first).all()
        for order in (names[::-1], chosen.sample(names, len(names))):
            assert torch.equal(image(order), first), (names, order)


def test_all_methods_in_any_order_give_the_same_image(host: Any, attach: Attach) -> None:
    orders = [random.Random(seed).sample(METHODS, len(METHODS)) for seed in range(3)]
    images = [sample(host, attach(host.model, *order)) for order in orders]
    assert torch.isfinite(images[0]).all() and all(torch.equal(image, images[0]) for image in images[1:])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Safe Denoiser",), [2]),
        (("SPELL",), [2]),
        (("SLD",), [2, 1]),
        (("Semantic Guidance",), [2, 1]),
        (("DAG",), [2, 1]),
        (TEXT_METHODS, [2, 1]),
        (("Safe Denoiser", "SPELL", "SLD"), [2, 1]),
        # Guider, gradient through the positive branch, guider again.
        (("STG",), [2, 1, 2]),
        (("STG", "DAG"), [2, 1, 2, 1]),
        # The gradient of the prediction itself goes through both branches.
        (("SDG",), [2, 2]),
    ],
    ids=str,
)
def test_forwards_are_those_of_the_cost_table(
    host: Any, attach: Attach, names: tuple[str, ...], expected: list[int]
) -> None:
    counted, rows = host.count_calls(attach(host.model, *names))
    sample(host, counted, steps=2)
    assert rows == expected * 2


def test_the_trace_counts_every_prediction_of_all_methods(host: Any, attach: Attach) -> None:
    from safe_guidance.nodes.host.engine.hooks import trace_of

    counted, rows = host.count_calls(attach(host.model, *METHODS))
    trace = trace_of(counted, sample(host, counted, STAR, HEART, steps=2))
    assert trace is not None and set(trace.methods) == set(METHODS)
    assert trace.forwards + sum(record.forwards for record in trace.records) == sum(rows)
    assert all(trace.summary(method).acted >= 1 for method in METHODS)


def test_recording_changes_no_bit_and_asks_for_no_prediction(
    host: Any, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safe_guidance.nodes.host.engine import run
    from safe_guidance.reports.trace import Trace

    class NoRecorder(run.Recorder):
        """Recorder that records nothing."""

        def call(self, *_: Any) -> None:
            pass

        def changed(self, *_: Any) -> None:
            pass

        def spending(self, *_: Any) -> Any:
            return contextlib.nullcontext()

        def trace(self) -> Trace:
            return Trace((), (), 0, ())

    counted, rows = host.count_calls(attach(host.model, *METHODS))
    recorded, calls = sample(host, counted, STAR, HEART, steps=2), list(rows)
    rows.clear()
    monkeypatch.setattr(run, "Recorder", NoRecorder)
    assert torch.equal(sample(host, counted, STAR, HEART, steps=2), recorded) and rows == calls


def test_without_its_corrections_a_model_is_the_plain_one(host: Any, attach: Attach) -> None:
    from safe_guidance.nodes.host.engine.hooks import unguarded

    bare, rows = host.count_calls(unguarded(attach(host.model, *METHODS)))
    assert torch.equal(sample(host, bare), sample(host, host.model)) and rows == [2] * 3


def test_inpainting_keeps_what_is_masked(host: Any, attach: Attach) -> None:
    original = sample(host, host.model, HEART, seed=4)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    latent = {"samples": original, "noise_mask": mask}
    changed = sample(host, attach(host.model, *METHODS), latent=latent)
    assert not torch.equal(changed, sample(host, host.model, latent=latent))
    torch.testing.assert_close(changed[..., 16:], original[..., 16:], atol=1e-5, rtol=1e-5)


def test_samples_without_a_trigger_stay_bit_identical(host: Any, attach: Attach) -> None:
    """One of four samples triggers the methods with a gate."""
    from safe_guidance.nodes.host.engine import hooks
    from safe_guidance.nodes.host.methods.safe_denoiser import SafeDenoiserCorrection

    prompts, triggered = (HEART, STAR, HEART, HEART), [False, True, False, False]
    baseline = sample(host, host.model, *prompts, steps=4)
    near = from_images(host.vae.decode(baseline[1:2]).clamp(0, 1))
    settings = SafeDenoiserSettings(strength=1.0, threshold=1.0, window=EVERY_STEP)
    model = hooks.attach(host.model, SafeDenoiserCorrection(near, host.vae, settings))
    model = attach(model, "STG", "SDG", judge=Brightness(triggered))
    guarded = sample(host, model, *prompts, steps=4)
    assert [torch.equal(a, b) for a, b in zip(guarded, baseline)] == [not t for t in triggered]


@pytest.mark.parametrize("sampler", ["heun", "euler_ancestral", "dpmpp_2s_ancestral"])
def test_every_sampler_comes_to_an_end_and_repeats_itself(host: Any, attach: Attach, sampler: str) -> None:
    model = attach(host.model, *METHODS)
    first = sample(host, model, sampler=sampler)
    assert torch.isfinite(first).all() and torch.equal(sample(host, model, sampler=sampler), first)


def test_safree_costs_no_forward(host: Any, attach: Attach) -> None:
    from safe_guidance.guidance.safree import SelfValidation
    from safe_guidance.nodes.host.methods.safree import filter_text

    for validation in (None, SelfValidation()):
        counted, rows = host.count_calls(host.model)
        host.sample(
            counted,
            filter_text(host.clip, STAR, ["star"], 0.01, validation).conditioning,
            host.empty_latent(),
            steps=4,
        )
        assert rows == [2] * 4


def test_safree_in_front_of_the_others(host: Any, attach: Attach) -> None:
    from safe_guidance.nodes.host.methods.safree import filter_text

    prompt = filter_text(host.clip, STAR, ["star"], 0.01, None).conditioning
    images = [
        host.sample(attach(host.model, *order), prompt, steps=3)
        for order in (("SLD", "SPELL"), ("SPELL", "SLD"))
    ]
    assert torch.equal(*images)
    assert not torch.equal(images[0], sample(host, attach(host.model, "SLD", "SPELL"), sampler="dpmpp_2m"))
