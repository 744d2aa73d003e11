"""Safe Denoiser and Sparse Repellency on small models of every family of the host, and on every latent
format it has.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safe_denoiser_values import WHOLE_IMAGES

from safe_guidance.formats.negation_set import NegationSet, from_images

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "flux"]
SIZE = 64


@pytest.fixture(scope="module")
def negation_set() -> NegationSet:
    coarse = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return from_images(
        torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear").movedim(1, -1)
    )


def safe_denoiser(model: Any, vae: Any, negation_set: NegationSet, **settings: Any) -> Any:
    """Attach Safe Denoiser, which acts at every noise level of its window on every image unless told
    otherwise.
    """
    from safe_guidance.nodes.safe_denoiser import SafeDenoiserNode

    defaults = {
        i.id: i.default
        for i in SafeDenoiserNode.define_schema().inputs
        if getattr(i, "default", None) is not None
    }
    # The closest of many references, so that some similarity is above zero.
    eager = {
        **WHOLE_IMAGES,
        "threshold": 0.0,
        "temperature": 0.005,
        "augmentation": "flip, crops and shifts",
        **settings,
    }
    return SafeDenoiserNode.execute(
        model=model, vae=vae, negation_set=negation_set, **{**defaults, **eager}
    ).args[0]


def spell(model: Any, vae: Any, negation_set: NegationSet, **settings: Any) -> Any:
    """Attach SPELL itself: random weights predict values of hundreds, and the node's radius ends at 10."""
    from safe_guidance.guidance.spell import SpellSettings
    from safe_guidance.nodes.host.engine.hooks import attach
    from safe_guidance.nodes.host.methods.spell import SpellCorrection

    return attach(model, SpellCorrection(negation_set, vae, SpellSettings(**settings)))


def sample(
    host: Any, model: Any, conditioning: list[Any], channels: int, cfg: float = 5.0, batch: int = 2
) -> torch.Tensor:
    latent = {"samples": torch.zeros(batch, channels, SIZE // 8, SIZE // 8)}
    result = host.nodes.common_ksampler(
        model, 3, 4, cfg, "euler", "simple", conditioning, conditioning, latent
    )
    return result[0]["samples"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(host: Any, tiny: Any, negation_set: NegationSet, family: str) -> None:
    model = tiny.tiny_model(family)
    channels = tiny.latent_channels(model)
    vae, conditioning = tiny.tiny_vae(channels), tiny.tiny_conditioning(batch=2)
    cfg = 1.0 if family == "flux" else 5.0
    baseline = sample(host, model, conditioning, channels, cfg)
    assert bool(torch.isfinite(baseline).all())
    for method, on, off in (
        (safe_denoiser, {"strength": 0.5}, {"strength": 0.0}),
        (
            safe_denoiser,
            {"strength": 0.5, "end_sigma": 0.0, "anchor": "unconditional"},
            {"start_sigma": 0.001, "end_sigma": 0.0},
        ),
        (
            safe_denoiser,
            {"mode": "tempered", "strength": 5.0, "effective_dimensions": 1, "end_sigma": 0.0},
            {"mode": "exact", "strength": 0.0},
        ),
        (
            safe_denoiser,
            {"mode": "official", "strength": 0.5, "kappa": 0.4},
            {"mode": "official", "strength": 0.0},
        ),
        (spell, {"radius": 1000.0}, {"radius": 0.0}),
    ):
        changed = sample(host, method(model, vae, negation_set, **on), conditioning, channels, cfg)
        assert bool(torch.isfinite(changed).all()) and not torch.equal(changed, baseline), (method, on)
        assert torch.equal(
            sample(host, method(model, vae, negation_set, **off), conditioning, channels, cfg), baseline
        ), (method, off)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_mean_the_same_noise_in_every_family(host: Any, tiny: Any, family: str) -> None:
    """The default window acts at the steps whose noise-to-signal ratio is at least 4.67, whatever the
    model calls its sigmas.
    """
    from safe_guidance.nodes.host.engine.schedule import noise_level
    from safe_guidance.nodes.host.engine.windows import percent_window

    model = tiny.tiny_model(family)
    sampling = model.get_model_object("model_sampling")
    for percent in (0.1, 0.3, 0.5, 0.9):
        sigma = torch.tensor([sampling.percent_to_sigma(percent)])
        level = noise_level(sampling, sigma)
        expected = float(sigma / (1 - sigma)) if family in ("sd3", "flux") else float(sigma)
        assert level.sigma == pytest.approx(expected, rel=1e-4)
        assert level in percent_window(model, percent, percent)
        assert noise_level(sampling, sigma) in percent_window(model, 0.0, 1.0)
    assert percent_window(model, 0.0, 0.0).high > 1e6 or family not in ("sd3", "flux")


def unconditional(tiny: Any, classes: bool) -> Any:
    """Make a UNet without text, with the image alone or a class vector beside it."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models_base

    blocks = {
        **tiny.UNET,
        "use_spatial_transformer": False,
        "context_dim": None,
        "transformer_depth": [0] * 8,
        "transformer_depth_middle": -1,
        "transformer_depth_output": [0] * 12,
        **({"num_classes": "sequential", "adm_in_channels": tiny.WIDTH} if classes else {}),
    }

    class Config(comfy.supported_models_base.BASE):
        unet_config: dict[str, Any] = {}
        unet_extra_config: dict[str, Any] = {}
        latent_format = comfy.latent_formats.SD15

    class Model(comfy.model_base.BaseModel):
        def encode_adm(self, **kwargs: Any) -> torch.Tensor | None:
            return kwargs.get("pooled_output") if classes else None

    config = Config({key: list(value) if isinstance(value, list) else value for key, value in blocks.items()})
    config.latent_format = comfy.latent_formats.SD15()
    config.set_inference_dtype(torch.float32, None)
    model = Model(
        config, model_type=comfy.model_base.ModelType.EPS, device=comfy.model_management.unet_offload_device()
    )
    model.diffusion_model.load_state_dict(tiny.random_weights(model.diffusion_model, 0))
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )


@pytest.mark.parametrize("classes", [False, True], ids=["unconditional", "class-conditional"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_models_without_text(
    host: Any, tiny: Any, negation_set: NegationSet, classes: bool, cfg: float
) -> None:
    model, vae = unconditional(tiny, classes), tiny.tiny_vae(4)
    nothing = [[torch.zeros(2, 1, tiny.WIDTH), {"pooled_output": torch.eye(tiny.WIDTH)[:2]}]]
    baseline = sample(host, model, nothing, 4, cfg)
    for method, settings in (
        (safe_denoiser, {"strength": 0.5}),
        (safe_denoiser, {"anchor": "unconditional"}),
        (spell, {"radius": 1000.0}),
    ):
        changed = sample(host, method(model, vae, negation_set, **settings), nothing, 4, cfg)
        assert bool(torch.isfinite(changed).all()) and not torch.equal(changed, baseline)
    assert torch.equal(
        sample(host, safe_denoiser(model, vae, negation_set, strength=0.0), nothing, 4, cfg), baseline
    )


FORMATS = [
    "SD15",
    "SDXL",
    "SDXL_Playground_2_5",
    "SD_X4",
    "SC_Prior",
    "SC_B",
    "SD3",
    "Flux",
    "Flux2",
    "HunyuanImage21",
] + [
    "ChromaRadiance",
    "ZImagePixelSpace",
    "HiDreamO1Pixel",
    "PixelDiTPixel",
]
FRAMES = [
    "Mochi",
    "LTXV",
    "LTXAV",
    "MiniMaxH3Video",
    "MiniMaxH3AV",
    "HunyuanVideo",
    "HunyuanVideo15",
    "Cosmos1CV8x8x8",
    "CogVideoX",
    "CogVideoX1_5",
    "Wan21",
    "Wan22",
    "SeedVR2",
]
"""Formats with a dimension of frames."""
NO_IMAGES = {"ACEAudio", "TripoSplat", "HunyuanImage21Refiner"}
"""Two- or three-dimensional by name, but sound, points in space, and two frames in the channels of one."""


def test_no_image_format_of_the_host_is_forgotten(host: Any) -> None:
    import comfy.latent_formats as formats

    found = {
        name
        for name, kind in inspect.getmembers(formats, inspect.isclass)
        if issubclass(kind, formats.LatentFormat)
        and kind is not formats.LatentFormat
        and kind().latent_dimensions in (2, 3)
    }
    assert found - set(FORMATS) - set(FRAMES) - NO_IMAGES == set()


@pytest.mark.parametrize("name", [*FORMATS, *FRAMES])
def test_every_latent_format_round_trips(host: Any, negation_set: NegationSet, name: str) -> None:
    """References are read in the sampler's space and convert back to the VAE's latents."""
    import comfy.latent_formats as formats

    from safe_guidance.nodes.host.engine.frames import Frames, images_out
    from safe_guidance.nodes.host.files.negation_latents import references_for

    if not hasattr(formats, name):
        pytest.skip(f"This host has no {name}.")
    latent_format = getattr(formats, name)()
    raw = (
        torch.randn(5, latent_format.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        .half()
        .float()
    )
    vae = SimpleNamespace(
        first_stage_model=torch.nn.Identity(),
        latent_dim=2,
        spacial_compression_encode=lambda: 8,
        encode=lambda pixels: raw[: len(pixels)],
    )
    model = SimpleNamespace(get_model_object=lambda _: latent_format)
    frames = Frames.of([(1, latent_format.latent_channels, 8, 8)])
    references = references_for(model, vae, negation_set, frames)
    seen = references.read(slice(None))
    if latent_format.latent_dimensions == 3:
        expected = latent_format.process_in(raw[:, :, None])[:, :, 0]
    else:
        expected = latent_format.process_in(raw)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images_out(latent_format, seen), raw, atol=1e-4, rtol=1e-4)
    # In the memory of a device they are kept in half precision.
    torch.testing.assert_close(
        references.resident(torch.device("cpu")).read(slice(None)), seen, atol=2e-3, rtol=2e-3
    )


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16])
def test_half_precision_models(host: Any, tiny: Any, negation_set: NegationSet, compute: torch.dtype) -> None:
    model = tiny.tiny_model("sd1", dtype=compute, compute=torch.float32)
    conditioning = tiny.tiny_conditioning(batch=2)
    baseline = sample(host, model, conditioning, 4)
    changed = sample(host, safe_denoiser(model, tiny.tiny_vae(4), negation_set), conditioning, 4)
    assert (
        bool(torch.isfinite(changed).all())
        and not torch.equal(changed, baseline)
        and changed.dtype == baseline.dtype
    )
