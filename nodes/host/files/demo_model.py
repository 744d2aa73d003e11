"""The bundled demo model as ComfyUI's own MODEL, CLIP and VAE objects.

It is a small Stable Diffusion 1.x that draws simple scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from torch import Tensor

from ....demo.networks import DOWNSCALE, FORMAT, LATENT_CHANNELS, Autoencoder
from ....formats import tensor_file
from .folders import ASSETS

WEIGHTS = ASSETS / "demo_model" / "demo_model.safetensors"
CLIP_VOCABULARY_SIZE = 49408
CONFIGURATION_KEYS = {
    "unet": frozenset(
        """image_size in_channels out_channels model_channels num_res_blocks channel_mult transformer_depth
        transformer_depth_output transformer_depth_middle num_heads num_head_channels use_spatial_transformer
        context_dim disable_self_attentions""".split()
    ),
    "text": frozenset({"width", "layers", "heads"}),
    "preview": frozenset({"factors", "bias"}),
}
"""Keys of each configuration in the metadata."""
MEMORY_PER_PIXEL = 2000
"""Upper bound of the bytes of activations per image pixel in encoding or decoding, for memory planning."""


@dataclass(frozen=True)
class DemoWeights:
    """Contents of the weights file: state dicts in float32 and the configurations from its metadata."""

    unet: dict[str, Tensor]
    text: dict[str, Tensor]
    vae: dict[str, Tensor]
    vocabulary: Tensor
    unet_config: dict[str, Any]
    text_config: dict[str, int]
    preview: dict[str, Any]


def read_weights(path: Path = WEIGHTS) -> DemoWeights:
    """Read the weights file.

    Raises:
        ValueError: it is not a demo model of this format.
    """
    file = tensor_file.opened(
        path, FORMAT, "is not the demo model. Restore the file from the pack's repository."
    )
    configurations = (file.description(part, keys) for part, keys in CONFIGURATION_KEYS.items())
    rows = file.shapes.get("vocabulary", ())
    if len(rows) != 1 or file.dtypes["vocabulary"] != torch.int32:
        raise file.error("it has no list of the tokens that it knows")
    vocabulary = file.tensor("vocabulary").long()
    if bool((vocabulary < 0).any()) or bool((vocabulary >= CLIP_VOCABULARY_SIZE).any()):
        raise file.error(f"it knows tokens outside 0 to {CLIP_VOCABULARY_SIZE - 1}")

    def part(prefix: str) -> dict[str, Tensor]:
        names = [name for name in file.shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): file.weights(name) for name in names}

    return DemoWeights(part("unet."), part("text."), part("vae."), vocabulary, *configurations)


class DemoModelConfig(comfy.supported_models.SD15):
    """Stable Diffusion 1.x as the host configures it, with a smaller UNet and the demo autoencoder's size."""

    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}

    def __init__(self, weights: DemoWeights) -> None:
        # The host's UNet consumes these lists, so it gets copies.
        config = {
            name: list(value) if isinstance(value, list) else value
            for name, value in weights.unet_config.items()
        }
        super().__init__(
            {**config, "adm_in_channels": None, "use_temporal_attention": False, "legacy": False}
        )
        self.latent_format = comfy.latent_formats.SD15()
        self.latent_format.spacial_downscale_ratio = DOWNSCALE
        self.latent_format.latent_rgb_factors = weights.preview["factors"]
        self.latent_format.latent_rgb_factors_bias = weights.preview["bias"]
        self.latent_format.taesd_decoder_name = None
        self.set_inference_dtype(torch.float32, None)


def _model(weights: DemoWeights) -> comfy.model_patcher.ModelPatcher:
    offload_device = comfy.model_management.unet_offload_device()
    model = DemoModelConfig(weights).get_model({}, "", device=offload_device)
    model.diffusion_model.load_state_dict(weights.unet)
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload_device
    )


def _clip(weights: DemoWeights) -> comfy.sd.CLIP:
    width = weights.text_config["width"]
    config = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": weights.text_config["layers"],
        "num_attention_heads": weights.text_config["heads"],
        "max_position_embeddings": 77,
        "projection_dim": width,
        "vocab_size": CLIP_VOCABULARY_SIZE,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(
        target, tokenizer_data={}, model_options={"clip_l_model_config": config, "dtype": torch.float32}
    )
    # Only the words of the demo scenes are stored; the embeddings of CLIP's other tokens are zero.
    table = "text_model.embeddings.token_embedding.weight"
    embeddings = torch.zeros(CLIP_VOCABULARY_SIZE, width)
    embeddings[weights.vocabulary] = weights.text[table]
    clip.load_sd({**weights.text, table: embeddings, "text_projection.weight": torch.eye(width)})
    return clip


def _vae(weights: DemoWeights) -> comfy.sd.VAE:
    # ComfyUI detects an autoencoder's class from its keys. It does not know this one: set its attributes.
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    autoencoder = Autoencoder().requires_grad_(False).eval()
    autoencoder.load_state_dict(weights.vae)
    vae.first_stage_model = autoencoder.to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.CoreModelPatcher(
        autoencoder, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.size = comfy.model_management.module_size(autoencoder)
    vae.downscale_ratio = vae.upscale_ratio = DOWNSCALE
    vae.latent_channels = LATENT_CHANNELS
    vae.disable_offload = False
    vae.memory_used_encode = lambda shape, dtype: MEMORY_PER_PIXEL * shape[2] * shape[3]
    vae.memory_used_decode = lambda shape, dtype: MEMORY_PER_PIXEL * shape[2] * shape[3] * DOWNSCALE**2
    return vae


def load_demo_model() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Read the demo model's MODEL, CLIP and VAE from the pack's assets.

    Nodes run under inference mode. The weights are created outside it, so that methods can differentiate
    through them.
    """
    with torch.inference_mode(False):
        weights = read_weights()
        return _model(weights), _clip(weights), _vae(weights)
