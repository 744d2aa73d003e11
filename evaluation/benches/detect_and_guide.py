"""Bench of Detect-and-Guide beside a UNet of Stable Diffusion 1.5's size, with and without a detection."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...guidance.core.noise_level import SigmaWindow
from ...guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration
from ...guidance.detect_and_guide.settings import DetectAndGuideSettings
from .sd15_unet import SHAPE, UNET, sd15_sized_model

TEXT_TOKENS = 77
WIDTH: Any = UNET["context_dim"]
Conditioning: TypeAlias = list[Any]
NEVER, ALWAYS = 0.999, 0.001
"""Calibrated thresholds that no detection reaches, and that every detection reaches."""


@dataclass
class Row:
    """Figures of one model: wall and CPU seconds of a step, and their ratio to the plain step.

    `ratio` is the median of the paired ratios of CPU seconds, which are more reliable than wall seconds on a
    busy machine. With one thread on an idle machine both are equal.
    """

    name: str
    seconds_per_step: float
    cpu_seconds_per_step: float
    ratio: float


def measure(repeats: int, side: int = SHAPE[-1]) -> list[Row]:
    """Measure a plain step, one without and one with a detection (CFG, one image of 8 * `side` pixels).

    The three alternate, so that other work on the machine affects all of them. Rows are printed at the end.
    """
    generator = torch.Generator().manual_seed(0)
    texts = [_random_text(generator) for _ in range(3)]
    models = _models(texts[2], generator)
    noise = torch.randn(1, SHAPE[0], side, side, generator=generator)
    for model in models.values():
        _sample(model, noise, texts)
    rounds = [{name: _sample(model, noise, texts) for name, model in models.items()} for _ in range(repeats)]
    rows = [_row(name, rounds) for name in models]
    for row in rows:
        sys.stdout.write(
            f"{row.name:20} {row.seconds_per_step:8.2f} s/step, "
            f"{row.cpu_seconds_per_step:8.2f} s of CPU  x{row.ratio:.3f}\n"
        )
    return rows


def _random_text(generator: torch.Generator) -> Conditioning:
    return [[torch.randn(1, TEXT_TOKENS, WIDTH, generator=generator), {}]]


def _models(safety: Conditioning, generator: torch.Generator) -> dict[str, Any]:
    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.detect_and_guide import DetectAndGuideCorrection

    plain = sd15_sized_model()
    embeddings = torch.randn(2, WIDTH, generator=generator)
    settings = DetectAndGuideSettings(window=SigmaWindow(), coverage=1.01)

    def guarded(threshold: float) -> Any:
        tokens = GuidelineTokens(embeddings, calibration=MapCalibration(threshold))
        return attach(plain, DetectAndGuideCorrection([tokens], safety, settings))

    return {"plain": plain, "DAG, nothing found": guarded(NEVER), "DAG, found": guarded(ALWAYS)}


def _sample(model: Any, noise: Tensor, texts: Sequence[Conditioning]) -> tuple[float, float]:
    """Sample one step and return its wall and CPU seconds."""
    import comfy.sample

    wall = time.perf_counter()
    cpu = time.process_time()
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


def _row(name: str, rounds: Sequence[dict[str, tuple[float, float]]]) -> Row:
    return Row(
        name,
        statistics.median(of_round[name][0] for of_round in rounds),
        statistics.median(of_round[name][1] for of_round in rounds),
        statistics.median(of_round[name][1] / of_round["plain"][1] for of_round in rounds),
    )
