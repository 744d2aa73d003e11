"""What a negation set of any size costs beside a real model: a UNet of Stable Diffusion 1.5's size with random weights."""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ...formats import latent_file
from ...guidance.core.noise_level import NoiseLevel, SigmaWindow
from ...guidance.safe_denoiser.whole_image import SafeDenoiserSettings

SHAPE = (4, 64, 64)
"""Latents of 512 x 512 pixels."""
WRITE_BATCH = 256

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


@dataclass
class Row:
    """Figures of one set size.

    `plain_seconds_per_step` is the sampler without the method, `method_seconds_per_step` the method's own time at a step at which
    it acts, `share` their ratio, `seconds_to_prepare` what the first step costs more (placing in memory, calibration).
    `private_memory_mb` is the method's peak memory, without mapped files.
    """

    references: int
    placement: str
    plain_seconds_per_step: float
    method_seconds_per_step: float
    share: float
    seconds_to_prepare: float
    private_memory_mb: float


def sd15_sized_model() -> Any:
    """A MODEL of the host with 860 million random weights."""
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


def random_references(path: Path, count: int) -> Any:
    """`count` random latents in a mapped file: every one with its negative, so that whatever is compared resembles some."""

    def batches() -> Iterator[tuple[Tensor, None]]:
        generator = torch.Generator().manual_seed(count)
        for start in range(0, count, WRITE_BATCH):
            size = min(WRITE_BATCH, count - start)
            half = torch.randn((size + 1) // 2, *SHAPE, generator=generator)
            yield torch.cat([half, -half])[:size], None

    latent_file.write(path, str(count), count, batches())
    return latent_file.read(path, str(count))


def _give_back() -> None:
    """Have the C library return freed memory to the system: a block that used it again would seem to need none."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def private_memory() -> Iterator[list[float]]:
    """The process's private memory in MB beyond what it has now, sampled while the block runs: a list of one number."""
    process, stop, peak = psutil.Process(), threading.Event(), [0.0]

    def private() -> float:
        info = process.memory_info()
        return float(info.rss - getattr(info, "shared", 0)) / 2**20

    _give_back()
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


def plain_seconds_per_step(steps: int) -> float:
    """The host's KSampler on the plain model with CFG, so two rows through the UNet, after a step to warm up."""
    import nodes as host_nodes

    nodes: Any = host_nodes
    model = sd15_sized_model()
    text = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1)), {}]]
    latent = {"samples": torch.zeros(1, *SHAPE)}

    def run(count: int) -> float:
        start = time.perf_counter()
        nodes.common_ksampler(model, 1, count, 7.5, "euler", "normal", text, text, latent)
        return time.perf_counter() - start

    run(1)
    return run(steps) / steps


def method_seconds(stored: Any, resident_share: float, calls: int) -> list[float]:
    """Seconds of calls of the method's correction, each of which acts; the first one also places and calibrates."""
    import comfy.latent_formats
    import comfy.model_management

    from ...nodes.host.engine.correction import Step
    from ...nodes.host.files import negation_latents
    from ...nodes.host.methods.safe_denoiser import Prepared, SafeDenoiserCorrection

    settings = SafeDenoiserSettings(window=SigmaWindow(), threshold=0.0)
    correction = SafeDenoiserCorrection(None, None, settings)  # type: ignore[arg-type]
    state = Prepared(stored.then(comfy.latent_formats.SD15().process_in))
    device = comfy.model_management.get_torch_device()
    denoised = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(2)).to(device)
    level = NoiseLevel.variance_exploding(7.0)
    step = Step(
        x=denoised + 7.0,
        timestep=torch.tensor([7.0]),
        sigma=7.0,
        level=level,
        denoised=denoised,
        predictions={},
        guider=None,
        model_options={},
        cond_scale=7.5,
        denoise_mask=None,
        is_new=True,
    )
    usual, negation_latents.RESIDENT_SHARE = negation_latents.RESIDENT_SHARE, resident_share
    seconds = []
    try:
        for _ in range(calls):
            start = time.perf_counter()
            change = correction.correct(step, state)
            # Asking waits for the device.
            assert change is not None and bool(change.active.all())
            seconds.append(time.perf_counter() - start)
    finally:
        negation_latents.RESIDENT_SHARE = usual
    return seconds


def measure(counts: Sequence[int], steps: int, calls: int = 5) -> list[Row]:
    """Two rows per size of the set, kept in memory and streamed from disk, beside the plain step of the model."""
    from ...nodes.host.files.negation_latents import RESIDENT_SHARE

    plain = plain_seconds_per_step(steps)
    rows = []
    with tempfile.TemporaryDirectory(prefix="safe_guidance_bench_") as folder:
        for count in counts:
            stored = random_references(Path(folder) / f"{count}.latents", count)
            for placement, share in (("in memory", RESIDENT_SHARE), ("streamed from disk", 0.0)):
                with private_memory() as peak:
                    first, *others = method_seconds(stored, share, calls)
                method = min(others)
                rows.append(Row(count, placement, plain, method, method / plain, first - method, peak[0]))
                sys.stdout.write(
                    f"{count:7} references {placement:18} {method * 1000:8.1f} ms/step beside {plain:.2f} s: {method / plain:.2%}, "
                    f"{first - method:.2f} s to prepare, {peak[0]:.0f} MB\n"
                )
                sys.stdout.flush()
    return rows
