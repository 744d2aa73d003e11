"""Caches of predictions beside methods that change texts: no stale answer, and no false claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.safe_latent_diffusion import SafeLatentDiffusionSettings
from safe_guidance.guidance.safe_text_guidance import SafeTextGuidanceSettings
from safe_guidance.guidance.safety_functions.interface import Assessment, SafetyFunction

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

STEPS = 6


class Brightness(SafetyFunction):
    """Safety function that finds every image unsafe."""

    name = "brightness"

    def __call__(self, images: Tensor) -> Assessment:
        return Assessment(images.mean((1, 2, 3)), torch.ones(len(images), dtype=torch.bool), [{}])


class Setting:
    """A tiny model, and STG on it that acts at every step."""

    def __init__(self, host: Any, tiny: ModuleType) -> None:
        self.host, self.tiny = host, tiny
        self.model, self.vae = tiny.tiny_model("sd1"), tiny.tiny_vae(4)

    def with_stg(self, model: Any, accumulate: bool = True) -> Any:
        from safe_guidance.nodes.host.engine.hooks import attach
        from safe_guidance.nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

        settings = SafeTextGuidanceSettings(rho=0.05, tau=-1e9, window=SigmaWindow(), accumulate=accumulate)
        return attach(model, SafeTextGuidanceCorrection(self.vae, Brightness(), settings))

    def with_sld(self, model: Any) -> Any:
        from safe_guidance.nodes.host.engine.hooks import attach
        from safe_guidance.nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection

        settings = SafeLatentDiffusionSettings(1000.0, threshold=1.0, window=SigmaWindow())
        return attach(model, SafeLatentDiffusionCorrection(self.tiny.tiny_conditioning(4), settings))

    def sample(self, model: Any) -> Tensor:
        conds = self.tiny.tiny_conditioning(0), self.tiny.tiny_conditioning(9)
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        return self.host.nodes.common_ksampler(model, 1, STEPS, 3.0, "euler", "normal", *conds, latent)[0][
            "samples"
        ]


@pytest.fixture(scope="module")
def setting(host: Any, tiny: ModuleType) -> Setting:
    return Setting(host, tiny)


def easy_cache(model: Any) -> Any:
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0]


def lazy_cache(model: Any) -> Any:
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0]


def tea_cache(model: Any) -> Any:
    """Cache like a pack's TeaCache: a function around the model, with a memory per place in the batch."""
    memory: dict[int, tuple[Tensor, Tensor]] = {}

    def wrapper(apply_model: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        x, places = call["input"], call["cond_or_uncond"]
        parts = x.chunk(len(places))
        if all(place in memory and _near(memory[place][0], part) for place, part in zip(places, parts)):
            return torch.cat([memory[place][1] for place in places])
        out = apply_model(x, call["timestep"], **call["c"])
        for place, part, found in zip(places, parts, out.chunk(len(places))):
            memory[place] = part.clone(), found
        return out

    cached = model.clone()
    cached.set_model_unet_function_wrapper(wrapper)
    return cached


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().mean() < 0.01 * a.abs().mean())


def shares(model: Any, samples: Tensor) -> Sequence[float]:
    """STG's change at every model call in which it acted, as a share of the prediction."""
    from safe_guidance.nodes.host.engine.hooks import trace_of

    trace = trace_of(model, samples)
    assert trace is not None
    return [record.change[0] for record in trace.of("STG") if record.forwards]


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("cache", [easy_cache, lazy_cache])
def test_a_moved_embedding_is_predicted_anew(setting: Setting, cache: Any, accumulate: bool) -> None:
    """Whichever of the two nodes comes first, every move changes the prediction."""
    for model in (
        setting.with_stg(cache(setting.model), accumulate),
        cache(setting.with_stg(setting.model, accumulate)),
    ):
        found = shares(model, setting.sample(model))
        assert found and all(share > 0 for share in found)


def test_easy_cache_counts_its_skipped_steps_as_without_the_pack(setting: Setting) -> None:
    """An embedding that is as the prompt's own again has its name, so the cache goes on."""
    plain, plain_rows = setting.host.count_calls(easy_cache(setting.model))
    setting.sample(plain)
    assert plain_rows == [2] * STEPS, "the cache is inside the counted call"
    baseline = setting.sample(plain)
    from dataclasses import replace

    from safe_guidance.nodes.host.engine.hooks import attach
    from safe_guidance.nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

    settings = replace(SafeTextGuidanceSettings(tau=1e9, window=SigmaWindow()), rho=0.05)
    safe = attach(easy_cache(setting.model), SafeTextGuidanceCorrection(setting.vae, Brightness(), settings))
    assert torch.equal(setting.sample(safe), baseline)


def test_a_cache_that_cannot_be_left_out_is_told(setting: Setting) -> None:
    """The trace claims no change that did not happen."""
    from safe_guidance.nodes.host.engine.hooks import trace_of

    model = setting.with_stg(tea_cache(setting.model))
    trace = trace_of(model, setting.sample(model))
    assert trace is not None
    assert trace.summary("STG").acted == 0
    assert any(note.startswith("STG") and "TeaCache" in note for note in trace.notes)


def test_a_text_that_such_a_cache_answers_is_told(setting: Setting) -> None:
    from safe_guidance.nodes.host.engine.hooks import trace_of

    model = setting.with_sld(tea_cache(setting.model))
    trace = trace_of(model, setting.sample(model))
    assert trace is not None and any("text of SLD" in note and "TeaCache" in note for note in trace.notes)
    clean = setting.with_sld(setting.model)
    trace = trace_of(clean, setting.sample(clean))
    assert trace is not None and not trace.notes


def test_a_cached_gradient_is_no_gradient(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient pass leaves caches out: it neither gets their answers nor leaves its graph in them."""
    import comfy_extras.nodes_easycache as host_cache

    kept: list[bool] = []
    update = host_cache.EasyCacheHolder.update_cache_diff

    def watched(self: Any, output: Tensor, *args: Any, **options: Any) -> None:
        kept.append(output.requires_grad)
        update(self, output, *args, **options)

    monkeypatch.setattr(host_cache.EasyCacheHolder, "update_cache_diff", watched)
    setting.sample(setting.with_stg(easy_cache(setting.model)))
    assert kept and not any(kept)
