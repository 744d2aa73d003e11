"""What Detect-and-Guide costs beside a real model: a UNet of Stable Diffusion 1.5's size, with nothing found and with something."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from ...guidance.core.noise_level import SigmaWindow
from ...guidance.detect_and_guide.guidance import DetectAndGuideSettings
from ...guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration
from .reference_model import SHAPE, UNET, sd15_sized_model

TEXT_TOKENS = 77
NEVER, ALWAYS = 0.999, 0.001
"""Calibrated thresholds that nothing and everything reaches."""


@dataclass
class Row:
    """Figures of one way: a step's CPU and wall seconds, and the median ratio of its CPU seconds to the plain step's beside it.

    On a machine that does other work, CPU seconds tell more than wall seconds; on an idle one with one thread they are the same.
    """

    name: str
    seconds_per_step: float
    cpu_seconds_per_step: float
    ratio: float


def measure(repeats: int, side: int = SHAPE[-1]) -> list[Row]:
    """The plain step (CFG, one image of 8 `side` pixels), then one in which nothing and one in which something is found.

    They take turns, so that what else the machine does falls on all of them; rows are printed at the end.
    """
    import comfy.sample

    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.detect_and_guide import DetectAndGuideCorrection

    plain = sd15_sized_model()
    generator = torch.Generator().manual_seed(0)
    width: Any = UNET["context_dim"]
    texts = [[[torch.randn(1, TEXT_TOKENS, width, generator=generator), {}]] for _ in range(3)]
    embeddings = torch.randn(2, width, generator=generator)
    settings = DetectAndGuideSettings(window=SigmaWindow(), coverage=1.01)

    def guarded(threshold: float) -> Any:
        tokens = GuidelineTokens(embeddings, calibration=MapCalibration(threshold))
        return attach(plain, DetectAndGuideCorrection([tokens], texts[2], settings))

    models = {"plain": plain, "DAG, nothing found": guarded(NEVER), "DAG, found": guarded(ALWAYS)}
    noise = torch.randn(1, SHAPE[0], side, side, generator=generator)

    def run(model: Any) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        comfy.sample.sample(
            model,
            noise,
            1,
            7.5,
            "euler",
            "normal",
            texts[0],
            texts[1],
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=1,
        )
        return time.perf_counter() - wall, time.process_time() - cpu

    for model in models.values():
        run(model)
    rounds = [{name: run(model) for name, model in models.items()} for _ in range(repeats)]
    rows = [
        Row(
            name,
            statistics.median(round_[name][0] for round_ in rounds),
            statistics.median(round_[name][1] for round_ in rounds),
            statistics.median(round_[name][1] / round_["plain"][1] for round_ in rounds),
        )
        for name in models
    ]
    for row in rows:
        sys.stdout.write(
            f"{row.name:20} {row.seconds_per_step:8.2f} s/step, {row.cpu_seconds_per_step:8.2f} s of CPU  x{row.ratio:.3f}\n"
        )
    return rows
