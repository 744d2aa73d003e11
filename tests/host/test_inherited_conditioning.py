"""A correction's text inherits what the branch it is compared with carries: ControlNet, images, hooks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_guidance.guidance.core.composition import Change
from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration
from safe_guidance.guidance.detect_and_guide.settings import DetectAndGuideSettings
from safe_guidance.guidance.safe_latent_diffusion import SafeLatentDiffusionSettings
from safe_guidance.guidance.semantic_guidance import Concept, SemanticGuidanceSettings

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

DECORATED = (
    "ControlNet",
    "inpaint image and mask",
    "LoRA hook",
    "LoRA hook with keyframes",
    "mask",
    "mask bounds",
    "regions",
    "area",
    "strength",
    "timestep range",
    "default beside a mask",
    "ControlNet in a region with a LoRA",
    "sizes of SDXL",
    "guidance of Flux",
    "reference latents",
)
METHODS = ("SLD", "Semantic Guidance", "DAG")
EVERY_STEP = SigmaWindow()


class Decorated:
    """A tiny model and a way to put one thing on a conditioning."""

    def __init__(self, tiny: ModuleType, name: str) -> None:
        import conditionings

        self.family, self.decorate = conditionings.DECORATIONS[name]
        self.model = _model(tiny, self.family)
        self._tiny = tiny

    def text(self, seed: int) -> list[Any]:
        conditioning: list[Any] = self._tiny.tiny_conditioning(seed)
        return conditioning

    def sample(self, host: Any, model: Any, negative: list[Any], positive: int = 0) -> Tensor:
        channels = self._tiny.latent_channels(model)
        latent = {"samples": torch.zeros(1, channels, 8, 8)}
        prompt = self.decorate(self.text(positive))
        return host.nodes.common_ksampler(model, 1, 2, 3.0, "euler", "normal", prompt, negative, latent)[0][
            "samples"
        ]


MODELS: dict[str, Any] = {}


def _model(tiny: ModuleType, family: str) -> Any:
    if family not in MODELS:
        MODELS[family] = tiny.tiny_model(family)
    return MODELS[family]


@pytest.fixture(params=DECORATED)
def decorated(host: Any, tiny: ModuleType, request: pytest.FixtureRequest) -> Decorated:
    return Decorated(tiny, request.param)


def test_the_table_is_complete(host: Any, tiny: ModuleType) -> None:
    import conditionings

    assert tuple(conditionings.DECORATIONS) == DECORATED


def attached(model: Any, name: str, text: list[Any]) -> Any:
    """Attach a method that acts everywhere at every step."""
    from safe_guidance.nodes.host.engine import hooks
    from safe_guidance.nodes.host.methods.detect_and_guide import DetectAndGuideCorrection
    from safe_guidance.nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection
    from safe_guidance.nodes.host.methods.semantic_guidance import SemanticGuidanceCorrection

    if name == "SLD":
        settings = SafeLatentDiffusionSettings(1000.0, threshold=1.0, window=EVERY_STEP)
        return hooks.attach(model, SafeLatentDiffusionCorrection(text, settings))
    if name == "Semantic Guidance":
        chosen = SemanticGuidanceSettings((Concept(scale=2.0, window=EVERY_STEP),))
        return hooks.attach(model, SemanticGuidanceCorrection([text], chosen))
    tokens = GuidelineTokens(torch.randn(2, 32), calibration=MapCalibration(0.011))
    detects = DetectAndGuideSettings(
        coverage=2.0, detection_threshold=0.0, edit_threshold=0.0, window=EVERY_STEP
    )
    return hooks.attach(model, DetectAndGuideCorrection([tokens], text, detects))


def test_the_negative_prompts_own_text_changes_nothing(host: Any, decorated: Decorated) -> None:
    from safe_guidance.nodes.host.engine.hooks import trace_of

    methods = METHODS[:2] if decorated.family == "flux" else METHODS
    negative = decorated.decorate(decorated.text(9))

    def guarded(seed: int) -> Any:
        model = decorated.model
        for name in methods:
            model = attached(model, name, decorated.text(seed))
        return model

    plain, plain_rows = host.count_calls(decorated.model)
    baseline = decorated.sample(host, plain, negative)
    same, rows = host.count_calls(guarded(9))
    assert torch.equal(decorated.sample(host, same, negative), baseline)
    assert rows == plain_rows
    other = guarded(4)
    trace = trace_of(other, decorated.sample(host, other, negative))
    assert trace is not None and all(trace.summary(name).acted for name in methods), (
        "every method must act on another text"
    )


def predictions_of(model: Any, text: list[Any]) -> tuple[Any, list[dict[str, Tensor]]]:
    """Return a model whose runs also predict a text, and the predictions of each step."""
    from safe_guidance.nodes.host.engine.correction import COND, UNCOND, Correction
    from safe_guidance.nodes.host.engine.hooks import attach

    found: list[dict[str, Tensor]] = []

    class Watched(Correction):
        texts = {"concept": text}

        def is_active(self, level: Any) -> bool:
            return True

        def wanted_texts(self, step: Any, state: Any) -> dict[str, Tensor]:
            return dict.fromkeys(("concept", COND, UNCOND), step.every_row)

        def correct(self, step: Any, state: Any) -> Change | None:
            found.append({name: out.clone() for name, out in step.predictions.items()})
            return None

    return attach(model, Watched()), found


def test_another_text_is_predicted_like_a_negative_prompt_of_that_text(
    host: Any, decorated: Decorated
) -> None:
    """So the direction from the negative prompt to the concept contains the texts' difference only."""
    concept, negative = decorated.text(4), decorated.decorate(decorated.text(9))
    watched, found = predictions_of(decorated.model, concept)
    decorated.sample(host, watched, negative)
    as_negative, expected = predictions_of(decorated.model, decorated.text(9))
    decorated.sample(host, as_negative, decorated.decorate(concept))
    torch.testing.assert_close(found[0]["concept"], expected[0]["negative"], atol=1e-4, rtol=1e-4)
    bare, without = predictions_of(decorated.model, decorated.text(9))
    decorated.sample(host, bare, concept)
    if len(decorated.decorate(concept)) == 1 and "strength" not in decorated.decorate(concept)[0][1]:
        assert not torch.allclose(without[0]["negative"], expected[0]["negative"], atol=1e-3), (
            "what is put on the conditioning must matter"
        )
