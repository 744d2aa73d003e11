"""Small transformers of the families of today with random weights, built from the host's own classes.

Import this module after the host: it needs `comfy`.
"""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models as supported
import torch

from tiny_models import WIDTH, random_weights

QWEN_IMAGE = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (8, 12, 12),
}
CHROMA = {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": 2,
    "context_in_dim": WIDTH,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 32,
    "n_layers": 1,
    "txt_ids_dims": [],
    "vec_in_dim": None,
}
HUNYUAN_VIDEO = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": WIDTH,
    "context_in_dim": WIDTH,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 96,
    "ffn_dim": 128,
    "freq_dim": 32,
    "text_dim": WIDTH,
    "text_len": 77,
    "num_heads": 4,
    "num_layers": 2,
}
COSMOS_PREDICT2 = {
    "image_model": "cosmos_predict2",
    "max_img_h": 64,
    "max_img_w": 64,
    "max_frames": 16,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "concat_padding_mask": True,
    "model_channels": 96,
    "num_blocks": 2,
    "num_heads": 4,
    "crossattn_emb_channels": WIDTH,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 32,
    "rope_h_extrapolation_ratio": 1.0,
    "rope_w_extrapolation_ratio": 1.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_per_block_abs_pos_emb": False,
    "rope_enable_fps_modulation": False,
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "chroma": (supported.Chroma, CHROMA),
    "hunyuan_video": (supported.HunyuanVideo, HUNYUAN_VIDEO),
    "qwen_image": (supported.QwenImage, QWEN_IMAGE),
    "cosmos_predict2": (supported.CosmosT2IPredict2, COSMOS_PREDICT2),
    "wan": (supported.WAN21_T2V, WAN),
}
"""The host's class of each family, and the configuration of a small network."""


def tiny_transformer(family: str, seed: int = 0) -> Any:
    """Return a MODEL of one of `FAMILIES` in float32."""
    host_class, settings = FAMILIES[family]
    small = type(f"Tiny{host_class.__name__}", (host_class,), {"unet_config": {}, "unet_extra_config": {}})
    config = small(dict(settings))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=comfy.model_management.unet_offload_device())
    # Random modulations make a transformer so sensitive that rounding decides; smaller ones leave it
    # well-behaved.
    model.diffusion_model.load_state_dict(random_weights(model.diffusion_model, seed, gain=0.6))
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def tiny_video_vae(seed: int = 2) -> Any:
    """Return a VAE of the host's class for Wan 2.1, Qwen-Image and their kin: 16 channels, 8 x 8 x 4."""
    network = comfy.ldm.wan.vae.WanVAE(
        dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
    )
    return comfy.sd.VAE(sd=random_weights(network, seed), dtype=torch.float32)
