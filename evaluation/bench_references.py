"""What a negation set of any size costs beside a real model: a UNet of Stable Diffusion 1.5's size with random weights."""

from __future__ import annotations

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

from ..guidance import latent_file
from ..guidance.noise_level import SigmaWindow
from ..guidance.safe_denoiser import SafeDenoiserSettings

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

    `plain_seconds_per_step` is the sampler without the method (CFG, so two rows through the UNet), `method_seconds_per_step`
    the method's own time when it acts, `seconds_to_prepare` what the first step costs once per run or set (placing in memory,
    calibration). `private_memory_mb` is how much higher the process's memory peaks than in the plain run, without mapped files.
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

    config = comfy.supported_models.SD15({key: list(value) if isinstance(value, list) else value for key, value in UNET.items()})
    config.latent_format = comfy.latent_formats.SD15()
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device=management.unet_offload_device())
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


@contextmanager
def private_memory() -> Iterator[list[float]]:
    """The process's private memory in MB beyond what it has now, sampled while the block runs: a list of one number."""
    process, stop, peak = psutil.Process(), threading.Event(), [0.0]

    def private() -> float:
        info = process.memory_info()
        return float(info.rss - getattr(info, "shared", 0)) / 2**20

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


def measure(counts: Sequence[int], steps: int) -> list[Row]:
    """A row per size of the set; the plain steps are measured first, once."""
    import nodes as host_nodes

    from ..nodes.host import negation_latents
    from ..nodes.host.runs import Step, attach
    from ..nodes.host.safe_denoiser import Prepared, SafeDenoiserCorrection

    nodes: Any = host_nodes

    class Timed(SafeDenoiserCorrection):
        """The method with given references, acting at every step, and how long each call took."""

        def __init__(self, references: Any) -> None:
            super().__init__(None, None, SafeDenoiserSettings(window=SigmaWindow(), threshold=0.0))  # type: ignore[arg-type]
            self.references, self.seconds = references, list[float]()

        def begin(self, context: Any) -> Prepared:
            return Prepared(self.references.then(context.model.get_model_object("latent_format").process_in))

        def correct(self, step: Step, state: Prepared) -> Any:
            start = time.perf_counter()
            change = super().correct(step, state)
            assert change is not None and bool(change.active.all())
            self.seconds.append(time.perf_counter() - start)
            return change

    def run(model: Any, steps: int) -> float:
        text = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1)), {}]]
        latent = {"samples": torch.zeros(1, *SHAPE)}
        start = time.perf_counter()
        nodes.common_ksampler(model, 1, steps, 7.5, "euler", "normal", text, text, latent)
        return time.perf_counter() - start

    model = sd15_sized_model()
    run(model, 1)
    with private_memory() as plain_peak:
        plain = min(run(model, steps) / steps for _ in range(2))
    rows = []
    with tempfile.TemporaryDirectory(prefix="safe_guidance_bench_") as folder:
        for count in counts:
            stored = random_references(Path(folder) / f"{count}.latents", count)
            for placement, share in (("in memory", negation_latents.RESIDENT_SHARE), ("streamed from disk", 0.0)):
                usual, negation_latents.RESIDENT_SHARE = negation_latents.RESIDENT_SHARE, share
                try:
                    timed = Timed(stored)
                    with private_memory() as peak:
                        run(attach(model, timed), steps)
                finally:
                    negation_latents.RESIDENT_SHARE = usual
                first, *others = timed.seconds
                method = min(others)
                rows.append(Row(count, placement, plain, method, method / plain, first - method, peak[0] - plain_peak[0]))
                sys.stdout.write(
                    f"{count:7} references {placement:18} {method * 1000:8.1f} ms/step beside {plain:.2f} s: {method / plain:.2%}, "
                    f"{first - method:.2f} s to prepare, {peak[0] - plain_peak[0]:+.0f} MB\n"
                )
                sys.stdout.flush()
    return rows
