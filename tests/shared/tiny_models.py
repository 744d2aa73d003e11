"""Small models of every family with random weights, built from the host's own classes.

Import this module after the host: it needs `comfy`.
"""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import torch
from comfy.model_base import ModelType
from torch import Tensor, nn

from safe_guidance.evaluation.benches import sd15_unet

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux")
UNETS = ("sd1", "sd1 inpaint", "sd2", "sdxl")
WIDTH = 32
"""Width of the text embeddings and of the pooled vectors of every tiny model."""
TOKENS = 77

UNET = {
    **sd15_unet.UNET,
    "model_channels": 32,
    "channel_mult": [1, 1, 2, 2],
    "context_dim": WIDTH,
    "num_heads": 4,
}
"""Blocks as in SD 1.x: cross-attention at input 1, 2, 4, 5, 7, 8, middle 0 and output 3 to 11."""

SDXL_UNET = {
    **UNET,
    "adm_in_channels": WIDTH + 6 * 256,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 1, 2],
    "transformer_depth": [0, 0, 2, 2, 3, 3],
    "transformer_depth_middle": 3,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
}
"""Blocks numbered as in SDXL: cross-attention at input 4, 5, 7, 8, middle 0, output 0 to 5."""

SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": WIDTH,
    "num_patches": 32 * 32,
    "pos_embed_max_size": 32,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": WIDTH, "out_features": 128},
    },
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": WIDTH,
    "context_in_dim": WIDTH,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
    "yak_mlp": False,
    "txt_norm": False,
}


def random_weights(module: nn.Module, seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Make a state dict of seeded random values; the host's layers start with uninitialised memory."""
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor)
        if tensor.ndim == 1:
            return (
                torch.ones(tensor.shape)
                if name.endswith("weight")
                else 0.1 * torch.randn(tensor.shape, generator=generator)
            )
        return gain * torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5

    return {name: values(name, tensor) for name, tensor in module.state_dict().items()}


def _base_model(family: str, dtype: torch.dtype, compute: torch.dtype | None) -> Any:
    # The host's UNet consumes the lists of its configuration, so it gets copies.
    configs: dict[str, tuple[type, dict[str, Any], type, ModelType | None]] = {
        "sd1": (comfy.supported_models.SD15, UNET, comfy.model_base.BaseModel, ModelType.EPS),
        "sd1 inpaint": (
            comfy.supported_models.SD15,
            {**UNET, "in_channels": 9},
            comfy.model_base.BaseModel,
            ModelType.EPS,
        ),
        "sd2": (
            comfy.supported_models.SD20,
            {**UNET, "use_linear_in_transformer": True},
            comfy.model_base.BaseModel,
            ModelType.V_PREDICTION,
        ),
        "sdxl": (comfy.supported_models.SDXL, SDXL_UNET, comfy.model_base.SDXL, ModelType.EPS),
        "sd3": (comfy.supported_models.SD3, SD3, comfy.model_base.SD3, None),
        "flux": (comfy.supported_models.Flux, FLUX, comfy.model_base.Flux, None),
    }
    supported, unet, model_class, model_type = configs[family]
    tiny = type(f"Tiny{supported.__name__}", (supported,), {"unet_config": {}, "unet_extra_config": {}})
    config = tiny({key: list(value) if isinstance(value, list) else value for key, value in unet.items()})
    config.latent_format = supported.latent_format()
    config.set_inference_dtype(dtype, compute)
    device = comfy.model_management.unet_offload_device()
    options = {} if model_type is None else {"model_type": model_type}
    model = model_class(config, device=device, **options)
    if family in UNETS and config.inpaint_model():
        model.set_inpaint()
    return model


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None, seed: int = 0
) -> Any:
    """Make a MODEL of one of `FAMILIES`, stored as `dtype` and computing in `compute` if that differs.

    Weights made in inference mode are inference tensors, as those of the host's loaders are.
    """
    model = _base_model(family, dtype, compute)
    # Random modulations make a transformer so sensitive that rounding decides; smaller ones leave it
    # well-behaved.
    weights = random_weights(model.diffusion_model, seed, gain=1.0 if family in UNETS else 0.6)
    model.diffusion_model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()})
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def tiny_conditioning(seed: int = 0, batch: int = 1, tokens: int = TOKENS) -> list[Any]:
    """Make a CONDITIONING with a row per sample of the batch, for a model of any family."""
    generator = torch.Generator().manual_seed(seed)
    embedding, pooled = (
        torch.randn(batch, tokens, WIDTH, generator=generator),
        torch.randn(batch, WIDTH, generator=generator),
    )
    return [[embedding, {"pooled_output": pooled}]]


def latent_channels(model: Any) -> int:
    """Return the number of latent channels of a model."""
    return int(model.get_model_object("latent_format").latent_channels)


def tiny_vae(channels: int = 4, seed: int = 2) -> Any:
    """Return a VAE of the host's class with `channels` latent channels and a factor of 8."""
    decoder = {
        "double_z": True,
        "z_channels": channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    weights = random_weights(comfy.sd.AutoencoderKL(ddconfig=decoder, embed_dim=channels), seed)
    vae = comfy.sd.VAE(
        sd=weights, config={"params": {"ddconfig": decoder, "embed_dim": channels}}, dtype=torch.float32
    )
    vae.latent_channels = channels
    return vae


def _clip_config(width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "projection_dim": width,
        "vocab_size": 49408,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def tiny_clip(family: str, seed: int = 3) -> Any:
    """Return a CLIP with all encoders of SDXL (CLIP-L, bigG), Flux (CLIP-L, T5) or SD3 (all three).

    CLIP-L is 32 wide, bigG 64, and T5 32, or 4,096 where SD3's layout of the rows asks for that.
    """
    t5 = {"d_model": 4096 if family == "sd3" else 32, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    configs = {
        "clip_l_model_config": _clip_config(32),
        "clip_g_model_config": _clip_config(64),
        "t5xxl_model_config": t5,
    }
    sd3, flux, sdxl = comfy.text_encoders.sd3_clip, comfy.text_encoders.flux, comfy.sdxl_clip
    tokenizer, encoders = {
        "sdxl": (sdxl.SDXLTokenizer, sdxl.SDXLClipModel),
        "flux": (flux.FluxTokenizer, flux.flux_clip()),
        "sd3": (sd3.SD3Tokenizer, sd3.sd3_clip(dtype_t5=torch.float16)),
    }[family]
    target = comfy.supported_models_base.ClipTarget(tokenizer, encoders)
    clip = comfy.sd.CLIP(target, tokenizer_data={}, model_options={**configs, "dtype": torch.float32})
    generator = torch.Generator().manual_seed(seed)
    for name, weight in clip.cond_stage_model.named_parameters():
        if weight.ndim <= 1:
            weight.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            # T5's table alone has 131 million numbers: filled where they are.
            spread = 1.0 if "embed" in name or "shared" in name else weight.shape[1] ** -0.5
            weight.data.uniform_(-spread, spread, generator=generator)
    return clip
