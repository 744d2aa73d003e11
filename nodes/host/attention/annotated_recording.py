"""Recording of the attention of annotated images under noise, from which guideline tokens are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher

from ....guidance.detect_and_guide.annotated_images import AnnotatedImages
from ....guidance.detect_and_guide.attention_cache import AttentionCache
from ..engine.conditioning import encode_each
from ..engine.frames import image_latents
from .families import learning_width
from .given_images import record_latents
from .joint_families import joint_family
from .joint_recording import JointRecording, record_jointly


def record_images(
    model: ModelPatcher,
    clip: Any,
    vae: Any,
    annotated: AnnotatedImages,
    captions: Sequence[str],
    sigmas: Sequence[float],
    layers: Sequence[int],
    seed: int,
) -> AttentionCache | JointRecording:
    """Record the model's attention for given images with added noise.

    Args:
        model, clip, vae: the host's models.
        annotated: the images.
        captions: one per image.
        sigmas: noise levels.
        layers: down-sampling factors of the layers to record; joint attention has one size only.
        seed: of the noise.

    Raises:
        ValueError: tokens cannot be learnt on this kind of model, it has none of the layers, or the recording
            would not fit into memory.
    """
    learning_width(model)
    latents = image_latents(annotated.images, vae)
    conditioning = encode_each(clip, captions)
    if joint_family(model.model.diffusion_model) is not None:
        return record_jointly(model, latents, conditioning, sigmas, seed)
    return record_latents(model, latents, annotated.masks, conditioning, sigmas, layers, seed)
