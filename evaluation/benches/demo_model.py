"""Bench of methods on the demo model: their KSampler and the plain one alternate in one process."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ...formats.negation_set import from_images
from ...guidance.core.noise_level import SigmaWindow
from ...guidance.safe_denoiser.settings import SafeDenoiserSettings
from .methods import Contender, every_method

PROMPT = "a yellow star in the center on a black plain background, flat style"
PLAIN = "none"


@dataclass
class Row:
    """Figures of one method: medians over the repeats. Ratios are to the plain run of the same round."""

    method: str
    references: int
    seconds_per_step: float
    seconds_ratio: float
    model_calls: int
    model_calls_ratio: float
    resident_memory_mb: float


def contenders(model: Any, clip: Any, vae: Any, sizes: Sequence[int]) -> list[Contender]:
    """Return the plain model, then every method with settings with which it acts."""
    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.safe_denoiser import SafeDenoiserCorrection

    settings = SafeDenoiserSettings(window=SigmaWindow(), threshold=0.0)
    found = [Contender(PLAIN, 0, model)]
    for size in sizes:
        images = torch.rand(size, 32, 32, 3, generator=torch.Generator().manual_seed(size))
        correction = SafeDenoiserCorrection(from_images(images), vae, settings)
        found.append(Contender("safe_denoiser", size, attach(model, correction)))
    return [*found, *every_method(model, clip, vae, PROMPT)]


class TimedSampler:
    """The host's KSampler on one prompt, which counts the model's calls."""

    def __init__(self, clip: Any, steps: int) -> None:
        import nodes as host_nodes

        # A type checker sees the pack's own folder `nodes` here.
        self._nodes: Any = host_nodes
        self._steps = steps
        self._positive = self._nodes.CLIPTextEncode().encode(clip, PROMPT)[0]
        self._negative = self._nodes.CLIPTextEncode().encode(clip, "")[0]

    def run(self, contender: Contender) -> tuple[float, int]:
        """Sample one image and return its seconds and the calls of the model."""
        from comfy.patcher_extension import WrappersMP

        calls = 0

        def count(executor: Any, *inputs: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return executor(*inputs, **options)

        counted = contender.model.clone()
        counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench", count)
        latent = self._nodes.EmptyLatentImage().generate(128, 128, 1)[0]
        positive = self._positive if contender.positive is None else contender.positive
        texts = (positive, self._negative)
        start = time.perf_counter()
        self._nodes.common_ksampler(counted, 1, self._steps, 5.0, "dpmpp_2m", "karras", *texts, latent)
        return time.perf_counter() - start, calls


def measure(steps: int, repeats: int, sizes: Sequence[int]) -> list[Row]:
    """Measure every contender `repeats` times, in turn, after a warm-up that also encodes the sets."""
    from ...nodes.host.files.demo_model import load_demo_model

    model, clip, vae = load_demo_model()
    sampler = TimedSampler(clip, steps)
    compared = contenders(model, clip, vae, sizes)
    resident = []
    for contender in compared:
        sampler.run(contender)
        resident.append(psutil.Process().memory_info().rss / 2**20)
    rounds = [[sampler.run(contender) for contender in compared] for _ in range(repeats)]
    rows = []
    for index, contender in enumerate(compared):
        seconds = [of_round[index][0] for of_round in rounds]
        ratios = [of_round[index][0] / of_round[0][0] for of_round in rounds]
        calls = rounds[0][index][1]
        plain_calls = rounds[0][0][1]
        row = Row(
            contender.method,
            contender.references,
            statistics.median(seconds) / steps,
            statistics.median(ratios),
            calls,
            calls / plain_calls,
            resident[index],
        )
        rows.append(row)
        _print(row)
    return rows


def _print(row: Row) -> None:
    name = row.method + (f", {row.references} references" if row.references else "")
    sys.stdout.write(
        f"{name:36} {row.seconds_per_step * 1000:8.1f} ms/step  x{row.seconds_ratio:.3f}  "
        f"{row.model_calls} calls  resident {row.resident_memory_mb:.0f} MB\n"
    )
