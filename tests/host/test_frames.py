"""Images with a frame dimension, videos, and videos with audio: methods see images, wherever they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safe_guidance.formats.negation_set import from_images

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")
SIZE = 64
WIDE = {"start_sigma": 1000.0, "end_sigma": 0.0}


def negation_set() -> Any:
    coarse = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return from_images(
        torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear").movedim(1, -1)
    )


@pytest.fixture(scope="module")
def transformers(host: Any, tiny: Any) -> Any:
    import tiny_transformers

    return tiny_transformers


def test_images_and_back() -> None:
    from safe_guidance.nodes.host.engine.frames import Frames

    generator = torch.Generator().manual_seed(1)
    video, audio = torch.randn(2, 4, 3, 5, 6, generator=generator), torch.randn(2, 8, 16, generator=generator)
    packed = torch.cat([video.reshape(2, 1, -1), audio.reshape(2, 1, -1)], -1)
    for frames, latent in (
        (Frames.of([video.shape]), video),
        (Frames.of([video.shape, audio.shape]), packed),
        (Frames.of([video[:, :, 0].shape]), video[:, :, 0]),
    ):
        images = frames.images(latent)
        assert images.shape == frames.image_shape
        assert torch.equal(images[frames.count], video[1, :, 0])
        assert torch.equal(frames.with_images(latent, images), latent)
    frames = Frames.of([video.shape, audio.shape])
    changed = frames.with_images(packed, torch.zeros(6, 4, 5, 6))
    assert torch.equal(changed[..., video[0].numel() :], audio.reshape(2, 1, -1))
    assert not bool(changed[..., : video[0].numel()].any())
    rows = torch.tensor([False, False, True, False, False, False])
    assert frames.samples(rows).tolist() == [True, False]
    assert frames.of_samples(frames.samples(rows)).tolist() == [True] * 3 + [False] * 3


def test_audio_alone_is_refused() -> None:
    from safe_guidance.nodes.host.engine.frames import Frames

    with pytest.raises(ValueError, match="works on images and videos"):
        Frames.of([(1, 8, 16)])


def test_a_latent_frame_inside_a_video_is_not_the_one_of_a_still_image(transformers: Any) -> None:
    from safe_guidance.nodes.host.files.negation_latents import encode

    vae = transformers.tiny_video_vae()
    alone = encode(negation_set(), vae, 8, 8)
    both = encode(negation_set(), vae, 8, 8, in_video=True)
    assert alone.latents.shape == (5, 16, 8, 8)
    assert torch.equal(both.latents[:5], alone.latents)
    difference = (both.latents[5:] - both.latents[:5]).float()
    assert float(difference.norm() / both.latents[:5].float().norm()) > 0.05


def guarded(node: Any, **inputs: Any) -> Any:
    """Execute a node with its schema's defaults for everything else."""
    defaults = {
        i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None
    }
    return node.execute(**{**defaults, **inputs}).args[0]


def safe_denoiser(model: Any, vae: Any, **settings: Any) -> Any:
    from safe_guidance.nodes.safe_denoiser import SafeDenoiserNode

    eager = {"threshold": 0.0, "temperature": 0.005, "start_sigma": 1e9, "end_sigma": 0.0, **settings}
    return guarded(SafeDenoiserNode, model=model, vae=vae, negation_set=negation_set(), **eager)


def spell(model: Any, vae: Any, **settings: Any) -> Any:
    from safe_guidance.nodes.spell import SparseRepellencyNode

    return guarded(SparseRepellencyNode, model=model, vae=vae, negation_set=negation_set(), **settings)


def brightness() -> Any:
    """A safety function whose gate is always open: the exponential of the mean pixel."""
    from safe_guidance.guidance.safety_functions.interface import Assessment, SafetyFunction

    class Brightness(SafetyFunction):
        name = "brightness"

        def __call__(self, images: torch.Tensor) -> Assessment:
            score = images.float().mean((1, 2, 3)).exp()
            return Assessment(score, torch.ones_like(score, dtype=torch.bool), [{}] * len(images))

    return Brightness()


def steered_by_text(model: Any, vae: Any, **settings: Any) -> Any:
    from safe_guidance.nodes.safe_text_guidance import SafeTextEmbeddingGuidanceNode

    inputs = {"model": model, "vae": vae, "safety_function": brightness(), **WIDE, **settings}
    return guarded(SafeTextEmbeddingGuidanceNode, **inputs)


def moved_by_data(model: Any, vae: Any, **settings: Any) -> Any:
    from safe_guidance.nodes.safe_data_guidance import SafeDataGuidanceNode

    inputs = {"model": model, "vae": vae, "safety_function": brightness(), **WIDE, **settings}
    return guarded(SafeDataGuidanceNode, **inputs)


def sample(host: Any, tiny: Any, model: Any, frames: int, batch: int = 2, **options: Any) -> torch.Tensor:
    shape = (batch, 16, frames, SIZE // 8, SIZE // 8)
    text, none = tiny.tiny_conditioning(seed=1), tiny.tiny_conditioning(seed=2)
    latent = {"samples": torch.zeros(shape), **options}
    result = host.nodes.common_ksampler(model, 3, 3, 4.0, "euler", "simple", text, none, latent)
    return result[0]["samples"]


@pytest.mark.parametrize("family, frames", [("qwen_image", 1), ("wan", 1), ("wan", 3)])
@pytest.mark.parametrize("method", [safe_denoiser, spell])
def test_methods_with_references(
    host: Any, tiny: Any, transformers: Any, family: str, frames: int, method: Any
) -> None:
    model, vae = transformers.tiny_transformer(family), transformers.tiny_video_vae()
    plain = sample(host, tiny, model, frames)
    off = {"strength": 0.0} if method is safe_denoiser else {"radius": 0.0}
    on = {"strength": 0.5} if method is safe_denoiser else {"radius": 10.0}
    assert torch.equal(sample(host, tiny, method(model, vae, **off), frames), plain)
    changed = sample(host, tiny, method(model, vae, **on), frames)
    assert changed.shape == plain.shape
    assert bool(torch.isfinite(changed).all())
    assert bool((changed != plain).flatten(3).any(-1).all())


def test_an_inpainting_mask_keeps_the_rest(host: Any, tiny: Any, transformers: Any) -> None:
    model, vae = transformers.tiny_transformer("wan"), transformers.tiny_video_vae()
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :, : SIZE // 2] = 1
    original = torch.randn(2, 16, 2, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(5))
    options = {"samples": original, "noise_mask": mask}
    plain = sample(host, tiny, model, 2, **options)
    changed = sample(host, tiny, safe_denoiser(model, vae, strength=0.5), 2, **options)
    assert torch.equal(changed[..., SIZE // 16 :], plain[..., SIZE // 16 :])
    assert not torch.equal(changed[..., : SIZE // 16], plain[..., : SIZE // 16])


@pytest.mark.parametrize("family", ["qwen_image", "wan"])
@pytest.mark.parametrize("decoder", ["vae", "linear"])
@pytest.mark.parametrize(
    "method, off, on",
    [
        (steered_by_text, {"rho": 0.0}, {"rho": 3.0}),
        (moved_by_data, {"strength": 0.0}, {"strength": 5.0, "cheap": False}),
    ],
)
def test_gradients_reach_single_images_of_five_dimensions(
    host: Any,
    tiny: Any,
    transformers: Any,
    family: str,
    decoder: str,
    method: Any,
    off: dict[str, Any],
    on: dict[str, Any],
) -> None:
    model, vae = transformers.tiny_transformer(family), transformers.tiny_video_vae()
    plain = sample(host, tiny, model, 1)
    assert torch.equal(sample(host, tiny, method(model, vae, decoder=decoder, **off), 1), plain)
    changed = sample(host, tiny, method(model, vae, decoder=decoder, **on), 1)
    assert bool(torch.isfinite(changed).all())
    assert bool((changed != plain).flatten(1).any(-1).all())


def test_gradients_of_videos_are_refused_with_the_reason(host: Any, tiny: Any, transformers: Any) -> None:
    model, vae = transformers.tiny_transformer("wan"), transformers.tiny_video_vae()
    with pytest.raises(ValueError, match="this run samples a video of 3 latent frames"):
        sample(host, tiny, steered_by_text(model, vae, rho=1.0), 3)
