"""Image encoders of every kind that the host loads: equal to the host's own, differentiable, cached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

TRANSFORMER = {
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "image_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 8,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "CLIP": {**TRANSFORMER, "model_type": "clip_vision_model", "projection_dim": 16},
    "SigLIP": {**TRANSFORMER, "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
    "SigLIP 2": {
        **TRANSFORMER,
        "model_type": "siglip2_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "image_size": -1,
        "num_patches": 256,
        "patch_size": 16,
    },
    "DINOv2": {
        **TRANSFORMER,
        "model_type": "dinov2",
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": True,
        "image_size": 518,
        "patch_size": 14,
    },
    "DINOv3": {
        **TRANSFORMER,
        "model_type": "dinov3",
        "num_register_tokens": 2,
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "use_gated_mlp": True,
        "gated_mlp_act": "silu",
        "image_size": 64,
        "patch_size": 16,
    },
}


@pytest.fixture(params=ENCODERS)
def clip_vision(request: pytest.FixtureRequest, host: Any) -> Any:
    """A CLIP_VISION with random weights, made under inference mode as a node makes it."""
    from comfy.clip_vision import ClipVisionModel

    with torch.inference_mode():
        made = ClipVisionModel(ENCODERS[request.param])
        generator = torch.Generator().manual_seed(3)
        for parameter in made.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        return made


def test_the_embedding_is_the_hosts_but_for_rounding_to_bytes(clip_vision: Any) -> None:
    from comfy.clip_model import clip_preprocess

    from safe_guidance.nodes.host.autograd.image_encoders import ClipVisionEncoder

    images = torch.rand(2, 3, 40, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        encoder = ClipVisionEncoder(clip_vision)
        own = encoder(images)
        pixels = clip_preprocess(images.movedim(1, -1), encoder.size, encoder.mean, encoder.std)
        embedded = clip_vision.model(pixel_values=pixels)[2]
    hosts = F.normalize((embedded.mean(1) if embedded.ndim == 3 else embedded).float(), dim=1)
    # The host rounds pixels to 1/255, which turns the embedding of random images by at most a few degrees.
    assert float((own * hosts).sum(1).min()) > 0.995


def test_gradients_flow_under_inference_mode_and_are_right(host: Any, clip_vision: Any) -> None:
    from safe_guidance.guidance.safety_functions.embedding_density import calibrate
    from safe_guidance.guidance.safety_functions.negation_set import NegationSetSafetyFunction
    from safe_guidance.nodes.host.autograd.decoders import make_decoder
    from safe_guidance.nodes.host.autograd.image_encoders import ClipVisionEncoder
    from safe_guidance.nodes.host.autograd.prediction_scores import assess, prediction_gradient

    with torch.inference_mode():
        encoder = ClipVisionEncoder(clip_vision)
        decoder = make_decoder("linear", host.model, host.vae)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        near = encoder(decoder(latents)).expand(4, -1)
        with torch.inference_mode(False):
            far = F.normalize(
                torch.randn(4, near.shape[1], generator=torch.Generator().manual_seed(4)), dim=1
            )
            unwanted = F.normalize(near.clone() + 0.1 * far, dim=1)
            function = NegationSetSafetyFunction(encoder, calibrate(unwanted, far, 0.0))
        gradient = prediction_gradient(decoder, function, latents)
        step = 1e-2 * gradient / gradient.norm()
        difference = (
            assess(decoder, function, latents + step).score - assess(decoder, function, latents - step).score
        )
    assert float(gradient.norm()) > 0
    # Central differences in float32 over a step of 1e-2 are good to a few per cent.
    assert float(difference) == pytest.approx(2e-2 * float(gradient.norm()), rel=0.1)


def test_embeddings_of_a_set_are_encoded_once(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.clip_vision import ClipVisionModel

    from safe_guidance.formats.negation_set import NegationSet
    from safe_guidance.nodes.host.autograd.image_encoders import ClipVisionEncoder
    from safe_guidance.nodes.host.files.negation_embeddings import embed

    clip_vision = ClipVisionModel(ENCODERS["CLIP"])
    for parameter in clip_vision.model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.2)
    encoder = ClipVisionEncoder(clip_vision)
    images = tuple(torch.randint(0, 256, (32 + 8 * i, 40, 3), dtype=torch.uint8) for i in range(5))
    neutral = torch.zeros(images[3].shape[:2], dtype=torch.uint8)
    masks = (None, torch.full(images[1].shape[:2], 255, dtype=torch.uint8), None, neutral, None)
    negation_set = NegationSet(images, masks)
    unwanted, others = embed(negation_set, encoder)
    assert others is not None
    assert (len(unwanted), len(others)) == (4, 1)
    expected = encoder(images[3].movedim(-1, 0)[None].float() / 255)
    # The file stores half precision: 11 bits of every component.
    assert float((others @ expected.T).item()) == pytest.approx(1, abs=1e-3)
    monkeypatch.setattr(ClipVisionEncoder, "__call__", lambda *_: pytest.fail("encoded again"))
    again, _ = embed(negation_set, encoder)
    assert torch.equal(again, unwanted)
