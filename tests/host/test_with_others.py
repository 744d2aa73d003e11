"""Every method of the pack beside everything of the host that wraps, caches, tiles, masks or repeats."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_guidance.formats.negation_set import from_images
from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.detect_and_guide.guidance import DetectAndGuideSettings
from safe_guidance.guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration
from safe_guidance.guidance.safe_data_guidance import SafeDataGuidanceSettings
from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserSettings
from safe_guidance.guidance.safe_latent_diffusion import SafeLatentDiffusionSettings
from safe_guidance.guidance.safe_text_guidance import SafeTextGuidanceSettings
from safe_guidance.guidance.safety_functions.interface import Assessment, SafetyFunction
from safe_guidance.guidance.semantic_guidance import Concept, SemanticGuidanceSettings
from safe_guidance.guidance.spell import SpellSettings

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

EVERY_STEP = SigmaWindow()
TEXT_METHODS = ("SLD", "Semantic Guidance", "DAG")
METHODS = ("Safe Denoiser", "SPELL", "STG", "SDG", *TEXT_METHODS, "SAFREE re-attention")
GRADIENTS = ("STG", "SDG")
OTHERS = (
    "nothing",
    "self-attention guidance",
    "perturbed-attention guidance",
    "EasyCache",
    "LazyCache",
    "context windows",
    "tiles in one batch",
    "tile by tile",
    "HyperTile",
    "deep shrink",
    "token merging",
    "FreeU",
    "FreeU V2",
    "RescaleCFG",
    "CFG-Zero*",
    "CFG norm",
    "adaptive projected guidance",
    "tangential damping",
    "normalized attention guidance",
    "epsilon scaling",
    "Mahiro",
    "FreSca",
    "differential diffusion",
    "inpainting",
    "compiled",
    "perpendicular negative",
    "perpendicular negative guider",
    "two prompts",
    "two prompts, nested",
    "regions",
    "timestep ranges with a ControlNet",
    "ControlNet",
    "inpainting model",
    "LoRA hook",
)


class Brightness(SafetyFunction):
    """Safety function that finds the given images of a batch unsafe."""

    name = "brightness"

    def __init__(self, rows: Sequence[bool]) -> None:
        self.rows = rows

    def __call__(self, images: Tensor) -> Assessment:
        whole = len(images) == len(self.rows)
        gate = torch.tensor(self.rows) if whole else torch.ones(len(images), dtype=torch.bool)
        return Assessment(images.mean((1, 2, 3)), gate, [{} for _ in images])


class Setting:
    """A tiny model beside one other thing of the host, with two images in a batch."""

    def __init__(self, host: Any, tiny: ModuleType, name: str, models: dict[str, Any]) -> None:
        import other_nodes

        self.other = other_nodes.OTHERS[name]
        if self.other.family not in models:
            models[self.other.family] = tiny.tiny_model(self.other.family)
        models.setdefault("vae", tiny.tiny_vae(4))
        self.host, self.tiny, self.name, self.vae = host, tiny, name, models["vae"]
        self.model = models[self.other.family]
        methods = ("SPELL",) if self.other.is_slow else METHODS
        self.methods = tuple(m for m in methods if not (self.other.has_hooks and m in GRADIENTS))

    def text(self, seed: int) -> list[Any]:
        conditioning: list[Any] = self.tiny.tiny_conditioning(seed)
        return conditioning

    def attached(
        self,
        model: Any,
        names: Sequence[str],
        on: float = 1.0,
        seed: int = 4,
        rows: Sequence[bool] | None = None,
    ) -> Any:
        """Attach methods that act at every step, or have strength zero; node ids are the methods' names."""
        from comfy_execution.utils import CurrentNodeContext

        from safe_guidance.nodes.host.engine.hooks import attach

        for name in names:
            with CurrentNodeContext("prompt", name):
                model = attach(model, self._correction(name, on, seed, rows or [True] * self.other.batch))
        return model

    def _correction(self, name: str, on: float, seed: int, rows: Sequence[bool]) -> Any:
        from safe_guidance.nodes.host.methods.detect_and_guide import DetectAndGuideCorrection
        from safe_guidance.nodes.host.methods.safe_data_guidance import SafeDataGuidanceCorrection
        from safe_guidance.nodes.host.methods.safe_denoiser import SafeDenoiserCorrection
        from safe_guidance.nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection
        from safe_guidance.nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection
        from safe_guidance.nodes.host.methods.safree_reattention import ReattentionCorrection
        from safe_guidance.nodes.host.methods.semantic_guidance import SemanticGuidanceCorrection
        from safe_guidance.nodes.host.methods.spell import SpellCorrection

        generator = torch.Generator().manual_seed(1)
        images = from_images(torch.rand(4, 128, 128, 3, generator=generator))
        tokens = GuidelineTokens(torch.randn(2, 32, generator=generator), calibration=MapCalibration(0.011))
        detects = {"coverage": 2.0, "detection_threshold": 0.0, "edit_threshold": 0.0, "window": EVERY_STEP}
        text, judge = self.text(seed), Brightness(rows)
        if name == "Safe Denoiser":
            settings = SafeDenoiserSettings("official", 0.5 * on, EVERY_STEP, kappa=0.0)
            return SafeDenoiserCorrection(images, self.vae, settings)
        if name == "SPELL":
            return SpellCorrection(images, self.vae, SpellSettings(radius=1e4 * on))
        if name == "STG":
            chosen = SafeTextGuidanceSettings(rho=0.02 * on, tau=-1e9, window=EVERY_STEP)
            return SafeTextGuidanceCorrection(self.vae, judge, chosen)
        if name == "SDG":
            strong = SafeDataGuidanceSettings(strength=0.1 * on, tau=-1e9, window=EVERY_STEP)
            return SafeDataGuidanceCorrection(self.vae, judge, strong)
        if name == "DAG":
            return DetectAndGuideCorrection([tokens], text, DetectAndGuideSettings(strength=on, **detects))
        if name == "SLD":
            wide = SafeLatentDiffusionSettings(1000.0 * on, threshold=1.0, window=EVERY_STEP)
            return SafeLatentDiffusionCorrection(text, wide)
        if name == "SAFREE re-attention":
            return ReattentionCorrection(text, *((0.9, 0.2) if on else (1.0, 1.0)))
        concept = Concept(scale=2.0 * on, window=EVERY_STEP)
        return SemanticGuidanceCorrection([text], SemanticGuidanceSettings((concept,)))

    def sample(self, model: Any, steps: int = 2) -> Tensor:
        import comfy.samplers

        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self.other.batch, 4, 16, 16, generator=generator)
        latent, mask = torch.zeros_like(noise), None
        if self.other.is_masked:
            latent = torch.randn(noise.shape, generator=generator)
            mask = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
        decorate = self.other.decorate
        guider = self.other.guider(model, decorate(self.text(0)), decorate(self.text(9)))
        sampler = comfy.samplers.sampler_object("euler")
        # HyperTile and token merging draw from the global generators.
        torch.manual_seed(3)
        samples: Tensor = guider.sample(
            noise, latent, sampler, sigmas, denoise_mask=mask, disable_pbar=True, seed=3
        )
        return samples


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture(params=OTHERS)
def setting(host: Any, tiny: ModuleType, models: dict[str, Any], request: pytest.FixtureRequest) -> Setting:
    return Setting(host, tiny, request.param, models)


def test_the_table_is_complete(host: Any, tiny: ModuleType) -> None:
    import other_nodes

    assert tuple(other_nodes.OTHERS) == OTHERS


def test_methods_that_are_off_and_concepts_that_are_the_negative_prompt_change_no_bit(
    host: Any, setting: Setting
) -> None:
    plain, plain_rows = host.count_calls(setting.other.patch(setting.model))
    baseline = setting.sample(plain)
    assert torch.isfinite(baseline).all()
    off = setting.attached(setting.model, METHODS, on=0.0)
    same = setting.attached(setting.other.patch(setting.model), TEXT_METHODS, seed=9)
    for model in (setting.other.patch(off), same):
        counted, rows = host.count_calls(model)
        assert torch.equal(setting.sample(counted), baseline) and rows == plain_rows


def test_every_method_acts_and_says_so(host: Any, setting: Setting, shown: dict[str, str]) -> None:
    from safe_guidance.nodes.host.engine.hooks import trace_of

    baseline = setting.sample(setting.other.patch(setting.model))
    counted, rows = host.count_calls(setting.attached(setting.other.patch(setting.model), setting.methods))
    samples = setting.sample(counted)
    trace = trace_of(counted, samples)
    assert trace is not None and torch.isfinite(samples).all() and not torch.equal(samples, baseline)
    counted_rows = trace.forwards + sum(record.forwards for record in trace.records)
    assert counted_rows * setting.other.calls == sum(rows)
    for name in setting.methods:
        assert shown[name]
        assert trace.summary(name).acted or "did nothing" not in shown[name], (name, shown[name])
    silent = {name: shown[name] for name in setting.methods if not trace.summary(name).acted}
    assert not silent


def test_only_the_unsafe_image_of_a_batch_changes(host: Any, setting: Setting) -> None:
    other = setting.other
    if other.has_hooks or other.is_cache or other.is_slow or other.batch == 1:
        pytest.skip("no gradients with hooks; a cache decides for all images of a batch")
    baseline = setting.sample(setting.other.patch(setting.model), steps=1)
    guarded = setting.attached(setting.other.patch(setting.model), GRADIENTS, rows=(False, True))
    samples = setting.sample(guarded, steps=1)
    assert torch.equal(samples[0], baseline[0]) and not torch.equal(samples[1], baseline[1])
