"""Bench of Safe Denoiser with large negation sets, beside a UNet of Stable Diffusion 1.5's size."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...formats import latent_file
from ...guidance.core.noise_level import NoiseLevel, SigmaWindow
from ...guidance.safe_denoiser.settings import SafeDenoiserSettings
from .sd15_unet import SHAPE, private_memory, sd15_sized_model

WRITE_BATCH = 256
"""References that are written at once."""


@dataclass
class Row:
    """Figures of one set size.

    Attributes:
        references: images in the negation set.
        placement: "in memory" or "streamed from disk".
        plain_seconds_per_step: of the sampler without the method.
        method_seconds_per_step: the method's own time at a step at which it acts.
        share: their ratio.
        seconds_to_prepare: extra time of the first step, for placing in memory and calibration.
        private_memory_mb: the method's peak memory, without mapped files.
    """

    references: int
    placement: str
    plain_seconds_per_step: float
    method_seconds_per_step: float
    share: float
    seconds_to_prepare: float
    private_memory_mb: float


def random_references(path: Path, count: int) -> Any:
    """Write `count` random latents into a file and return them mapped.

    Each latent comes with its negative, so that every prediction is similar to some reference.
    """

    def batches() -> Iterator[tuple[Tensor, None]]:
        generator = torch.Generator().manual_seed(count)
        for start in range(0, count, WRITE_BATCH):
            size = min(WRITE_BATCH, count - start)
            half = torch.randn((size + 1) // 2, *SHAPE, generator=generator)
            yield torch.cat([half, -half])[:size], None

    latent_file.write(path, str(count), count, batches())
    return latent_file.read(path, str(count))


def plain_seconds_per_step(steps: int) -> float:
    """Measure a step of the host's KSampler on the plain model with CFG, after a warm-up step."""
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
    """Measure the seconds of `calls` calls of the method's correction.

    All act; the first also places the references and calibrates.

    Args:
        stored: the references, as `random_references` returns them.
        resident_share: share of the free memory that references may take; with 0 they are streamed from disk.
    """
    import comfy.latent_formats
    import comfy.model_management

    from ...guidance.safe_denoiser.choice import choose_comparison
    from ...nodes.host.engine.correction import Step
    from ...nodes.host.engine.frames import Frames
    from ...nodes.host.files import negation_latents
    from ...nodes.host.methods.safe_denoiser import LastComparison, SafeDenoiserCorrection, SafeDenoiserState

    settings = SafeDenoiserSettings(window=SigmaWindow(), threshold=0.0)
    correction = SafeDenoiserCorrection(None, None, settings)  # type: ignore[arg-type]
    references = stored.then(comfy.latent_formats.SD15().process_in)
    state = SafeDenoiserState(choose_comparison(references, settings), LastComparison())
    device = comfy.model_management.get_torch_device()
    denoised = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(2)).to(device)
    level = NoiseLevel.variance_exploding(7.0)
    step = Step(
        x=denoised + 7.0,
        latent=denoised + 7.0,
        frames=Frames.of([denoised.shape]),
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
            # Reading the values waits for the device.
            assert change is not None and bool(change.active.all())
            seconds.append(time.perf_counter() - start)
    finally:
        negation_latents.RESIDENT_SHARE = usual
    return seconds


def measure(counts: Sequence[int], steps: int, calls: int = 5) -> list[Row]:
    """Measure each set size twice: with references in memory and streamed from disk."""
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
                _print(rows[-1])
    return rows


def _print(row: Row) -> None:
    sys.stdout.write(
        f"{row.references:7} references {row.placement:18} {row.method_seconds_per_step * 1000:8.1f} ms/step "
        f"beside {row.plain_seconds_per_step:.2f} s: {row.share:.2%}, "
        f"{row.seconds_to_prepare:.2f} s to prepare, {row.private_memory_mb:.0f} MB\n"
    )
    sys.stdout.flush()
