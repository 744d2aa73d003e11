"""A UNet of Stable Diffusion 1.5's size with random weights: its costs are those of the real model.

The benches use it so that nothing has to be downloaded. Its images are noise.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

SHAPE = (4, 64, 64)
"""Shape of the latents of 512 x 512 pixels."""

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "num_heads": 8,
    "num_head_channels": -1,
}
"""Stable Diffusion 1.5, as the host's model detection describes it."""


def sd15_sized_model() -> Any:
    """Build a MODEL of the host with 860 million random weights."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(
        {key: list(value) if isinstance(value, list) else value for key, value in UNET.items()}
    )
    config.latent_format = comfy.latent_formats.SD15()
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(
        config, model_type=comfy.model_base.ModelType.EPS, device=management.unet_offload_device()
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.data.uniform_(-0.03, 0.03, generator=generator)
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def _return_freed_memory() -> None:
    """Make the C library return freed memory to the system.

    A measured block that used this memory again would otherwise seem to need none.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def private_memory() -> Iterator[list[float]]:
    """Measure the peak of the process's private memory while the block runs, in MB above its present value.

    Yields a list whose only number is the peak so far.
    """
    process, stop, peak = psutil.Process(), threading.Event(), [0.0]

    def private() -> float:
        info = process.memory_info()
        return float(info.rss - getattr(info, "shared", 0)) / 2**20

    _return_freed_memory()
    before = private()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], private() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
