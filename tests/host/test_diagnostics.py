"""Node messages after a run: what each correction did, and settings that had no effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from demo_prompts import STAR
from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.safe_latent_diffusion import MAX, WEAK, SafeLatentDiffusionSettings

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


def attached(model: Any, correction: Any, node: str) -> Any:
    """Attach a correction as the host does, while it executes the node with this id."""
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.nodes.host.engine.hooks import attach

    with CurrentNodeContext("prompt", node):
        return attach(model, correction)


def sld(host: Any, settings: SafeLatentDiffusionSettings = MAX) -> Any:
    from safe_guidance.nodes.host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection

    return SafeLatentDiffusionCorrection(host.text("star"), settings)


def notes(model: Any, samples: torch.Tensor) -> tuple[str, ...]:
    from safe_guidance.nodes.host.engine.hooks import trace_of

    trace = trace_of(model, samples)
    assert trace is not None
    return trace.notes


def test_a_correction_that_acted_says_how_much(host: Any, shown: dict[str, str]) -> None:
    model = attached(host.model, sld(host), "7")
    samples = host.sample(model, host.text(STAR))
    assert shown["7"].startswith("SLD acted at 6 of 6 model calls") and notes(model, samples) == ()


def test_cfg_1_gives_a_note(host: Any, shown: dict[str, str]) -> None:
    model = attached(host.model, sld(host), "7")
    samples = host.sample(model, host.text(STAR), cfg=1.0, steps=2)
    (note,) = notes(model, samples)
    assert note.startswith("CFG is 1") and shown["7"].endswith(note)
    assert shown["7"].startswith("SLD acted at 2 of 2 model calls")


def test_a_sampler_without_a_negative_prompt_gives_a_note(host: Any, shown: dict[str, str]) -> None:
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    model = attached(host.model, sld(host), "7")
    guider = Guider_Basic(model)
    guider.set_conds(host.text(STAR))
    latent = torch.zeros(1, 4, 32, 32)
    sigmas = comfy.samplers.calculate_sigmas(host.model.get_model_object("model_sampling"), "normal", 2)
    guider.sample(
        torch.randn(1, 4, 32, 32),
        latent,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        seed=0,
        disable_pbar=True,
    )
    assert "needs a negative prompt" in shown["7"]


def test_image_to_image_below_the_window_gives_a_note(host: Any, shown: dict[str, str]) -> None:
    from safe_guidance.formats.negation_set import from_images
    from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserSettings
    from safe_guidance.nodes.host.methods.safe_denoiser import SafeDenoiserCorrection

    images = from_images(torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0)))
    model = attached(
        host.model, SafeDenoiserCorrection(images, host.vae, SafeDenoiserSettings(strength=1.0)), "3"
    )
    started = {"samples": host.sample(host.model, host.text(STAR))}
    host.sample(model, host.text(STAR), started, denoise=0.3)
    assert (
        shown["3"].startswith("Safe Denoiser did nothing: sampling ran from sigma")
        and "outside its window" in shown["3"]
    )
    host.sample(model, host.text(STAR))
    assert "did nothing" not in shown["3"]


def test_a_set_without_a_similar_image_says_so(host: Any, shown: dict[str, str]) -> None:
    from safe_guidance.formats.negation_set import from_images
    from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserSettings
    from safe_guidance.nodes.host.methods.safe_denoiser import SafeDenoiserCorrection

    images = from_images(torch.rand(8, 128, 128, 3, generator=torch.Generator().manual_seed(0)))
    settings = SafeDenoiserSettings(strength=1.0, threshold=2.0)
    host.sample(
        attached(host.model, SafeDenoiserCorrection(images, host.vae, settings), "3"), host.text(STAR)
    )
    assert "watched" in shown["3"] and "changed nothing" in shown["3"]


def test_a_method_that_is_off_gives_no_note(host: Any, shown: dict[str, str]) -> None:
    off = SafeLatentDiffusionSettings(scale=0.0)
    model = attached(host.model, sld(host, off), "7")
    assert notes(model, host.sample(model, host.text(STAR), steps=2)) == ()
    assert shown["7"] == "SLD was not active in this run."


def test_every_node_gets_its_own_message(host: Any, shown: dict[str, str]) -> None:
    late = SafeLatentDiffusionSettings(momentum_scale=0.0, window=SigmaWindow(high=0.025))
    model = attached(attached(host.model, sld(host, late), "1"), sld(host, WEAK), "2")
    host.sample(model, host.text(STAR), steps=4)
    assert "did nothing" in shown["1"] and "SLD 2 acted" in shown["2"]


def test_a_recording_correction_shows_no_message(host: Any, shown: dict[str, str]) -> None:
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.nodes.host.attention.given_images import record_latents

    looked_at = attached(host.model, sld(host), "7")
    with CurrentNodeContext("prompt", "8"):
        record_latents(
            looked_at,
            torch.zeros(1, 4, 32, 32),
            torch.zeros(1, 128, 128),
            host.text("a star"),
            (2.0,),
            (2,),
            seed=1,
        )
    assert list(shown) == ["7"]


def test_without_a_server_nothing_is_sent(host: Any) -> None:
    from safe_guidance.nodes.host.engine.correction import KEY
    from safe_guidance.nodes.host.engine.hooks import attach

    model = attach(host.model, sld(host))
    host.sample(model, host.text(STAR), steps=1)
    (attachment,) = model.model_options[KEY]
    assert attachment.node is None
