"""The decoders that safety functions look through: how they differ, and that gradients flow through each."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from demo_prompts import HEART, STAR
from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.safe_text_guidance import SafeTextGuidanceSettings
from safe_guidance.guidance.safety_functions.interface import Assessment, SafetyFunction

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


class Brightness(SafetyFunction):
    """Safety function that scores brightness."""

    name = "brightness"

    def __call__(self, images: Tensor) -> Assessment:
        score = torch.sin(3 * images).mean((1, 2, 3))
        return Assessment(score, torch.ones(len(images), dtype=torch.bool), [{} for _ in images])


@pytest.fixture
def taesd_file(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a tiny autoencoder with random weights to the host's folder for them."""
    import comfy.taesd.taesd
    import folder_paths

    network = comfy.taesd.taesd.TAESD(None, None, latent_channels=4).taesd_decoder
    generator = torch.Generator().manual_seed(3)
    weights = {
        n: 0.5 * torch.randn(t.shape, generator=generator) * t[0].numel() ** -0.5
        for n, t in network.state_dict().items()
    }
    path = tmp_path / "taesd_decoder.safetensors"
    save_file(weights, path)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], {".safetensors"})
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return path


def guided(host: Any, model: Any, vae: Any, decoder: Any) -> Any:
    from safe_guidance.nodes.host.engine.hooks import attach
    from safe_guidance.nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

    settings = SafeTextGuidanceSettings(rho=0.02, tau=-1e9, window=SigmaWindow())
    return attach(model, SafeTextGuidanceCorrection(vae, Brightness(), settings, decoder))


def test_the_linear_decoder_sees_about_the_same(host: Any) -> None:
    from safe_guidance.nodes.host.autograd.decoders import make_decoder

    exact, linear = (make_decoder(name, host.model, host.vae) for name in ("vae", "linear"))
    latents = host.sample(host.model, host.text(STAR, HEART), steps=8) * 0.18215
    difference = (exact(latents) - linear(latents)).abs().mean()
    assert difference < 0.08 < exact(latents).std()
    plain = host.sample(host.model, host.text(STAR), steps=2)
    assert not torch.equal(
        host.sample(guided(host, host.model, host.vae, "linear"), host.text(STAR), steps=2), plain
    )


def test_the_tiny_autoencoder_is_the_hosts(host: Any, tiny: ModuleType, taesd_file: Path) -> None:
    """It gives the images of the host's previews, and can guide a run."""
    import comfy.taesd.taesd

    from safe_guidance.nodes.host.autograd.decoders import make_decoder

    model, vae = tiny.tiny_model("sd1"), tiny.tiny_vae()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    preview = comfy.taesd.taesd.TAESD(None, str(taesd_file), latent_channels=4).decode(latents) / 2 + 0.5
    shown = make_decoder("taesd", model, vae)(latents)
    assert shown.shape == (2, 3, 64, 64) and shown.std() > 0.01
    torch.testing.assert_close(shown, preview)
    args = (
        1,
        2,
        3.0,
        "euler",
        "normal",
        tiny.tiny_conditioning(0),
        tiny.tiny_conditioning(9),
        {"samples": torch.zeros(1, 4, 8, 8)},
    )
    through, plain = (
        host.nodes.common_ksampler(m, *args)[0]["samples"] for m in (guided(host, model, vae, "taesd"), model)
    )
    assert torch.isfinite(through).all() and not torch.equal(through, plain)


@pytest.mark.parametrize("name", ["vae", "linear", "taesd"])
def test_gradients_through_a_decoder_by_finite_differences(
    host: Any, tiny: ModuleType, taesd_file: Path, name: Any
) -> None:
    from safe_guidance.nodes.host.autograd.decoders import make_decoder
    from safe_guidance.nodes.host.autograd.prediction_scores import prediction_gradient

    decoder, function = make_decoder(name, tiny.tiny_model("sd1"), tiny.tiny_vae()), Brightness()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    gradient = prediction_gradient(decoder, function, latents)
    direction = gradient / gradient.norm()

    def slope(width: float) -> float:
        up, down = (
            float(function(decoder(latents + shift * direction)).score.double()) for shift in (width, -width)
        )
        return (up - down) / (2 * width)

    assert (4 * slope(0.1) - slope(0.2)) / 3 == pytest.approx(float(gradient.norm()), rel=5e-3)


def test_a_fast_decoder_without_its_file_says_what_to_do(host: Any, tiny: ModuleType) -> None:
    with pytest.raises(FileNotFoundError, match="models/vae_approx"):
        guided(host, tiny.tiny_model("sd1"), tiny.tiny_vae(), "taesd")
