"""What each method costs: its KSampler against the plain one, taking turns in one process, as ratios."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ...formats.negation_set import from_images
from ...guidance.core.noise_level import SigmaWindow
from ...guidance.safe_denoiser.settings import SafeDenoiserSettings
from ..host import import_host
from . import detect_and_guide, reference_model, safe_text_guidance
from .recording import recording_share

PROMPT = "a yellow star in the center on a black plain background, flat style"
PLAIN = "none"
LARGE = (16, 515, 3000, 100_000)
"""One image in several views, the published nudity and CoPro sets, and the largest that is aimed at."""


@dataclass
class Row:
    """Figures of one method: medians over repeats; ratios pair each run with the plain run before it.

    `recording_share` is the part of its own run that recording the trace takes.
    """

    method: str
    references: int
    seconds_per_step: float
    seconds_ratio: float
    model_calls: int
    model_calls_ratio: float
    resident_memory_mb: float
    recording_share: float


@dataclass(frozen=True)
class Contender:
    method: str
    references: int
    model: Any


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and write its rows as JSON. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dev.py bench", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--references", type=int, nargs="+", default=[16, 515, 3000], help="sizes of the negation set"
    )
    parser.add_argument(
        "--large",
        type=int,
        nargs="*",
        metavar="COUNT",
        help="measure sets of these sizes (16 515 3000 100000 when none are given) beside a UNet of Stable Diffusion 1.5's size instead; "
        "takes minutes and 8 GB of memory",
    )
    parser.add_argument(
        "--text-guidance",
        type=int,
        nargs="?",
        const=512,
        metavar="PIXELS",
        help="measure Safe Text Embedding Guidance on a UNet of Stable Diffusion 1.5's size instead, for images of this side "
        "(512 when none is given); takes minutes and 10 GB of memory",
    )
    parser.add_argument(
        "--detect-and-guide",
        type=int,
        nargs="?",
        const=512,
        metavar="PIXELS",
        help="measure Detect-and-Guide on a UNet of Stable Diffusion 1.5's size instead, for images of this side (512 when none is "
        "given); takes minutes and 5 GB of memory",
    )
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        with torch.inference_mode():
            if args.large is not None:
                return _write(reference_model.measure(args.large or LARGE, 2), args.output)
            if args.text_guidance:
                return _write(safe_text_guidance.measure(1, args.text_guidance // 8), args.output)
            if args.detect_and_guide:
                return _write(detect_and_guide.measure(args.repeats, args.detect_and_guide // 8), args.output)
            rows = measure(args.steps, args.repeats, args.references)
    report = {
        "version": 1,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": args.steps,
        "rows": [asdict(r) for r in rows],
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        name = row.method + (f", {row.references} references" if row.references else "")
        sys.stdout.write(
            f"{name:36} {row.seconds_per_step * 1000:8.1f} ms/step  x{row.seconds_ratio:.3f}  "
            f"{row.model_calls} calls  resident {row.resident_memory_mb:.0f} MB  recording {row.recording_share:.2%}\n"
        )
    return 0


def _write(rows: Sequence[Any], output: Path) -> int:
    report = {
        "version": 1,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": [asdict(row) for row in rows],
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def contenders(model: Any, vae: Any, sizes: Sequence[int]) -> list[Contender]:
    """The plain model first, then every method in the setting in which it acts at every step."""
    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.safe_denoiser import SafeDenoiserCorrection

    settings = SafeDenoiserSettings(window=SigmaWindow(), threshold=0.0)
    found = [Contender(PLAIN, 0, model)]
    for size in sizes:
        images = torch.rand(size, 32, 32, 3, generator=torch.Generator().manual_seed(size))
        correction = SafeDenoiserCorrection(from_images(images), vae, settings)
        found.append(Contender("safe_denoiser", size, attach(model, correction)))
    return found


def measure(steps: int, repeats: int, sizes: Sequence[int]) -> list[Row]:
    """Time every contender `repeats` times in turn, after a warm-up that also encodes the sets."""
    from comfy.patcher_extension import WrappersMP

    import nodes as host_nodes

    from ...nodes.host.files.demo_model import load_demo_model

    # A type checker sees the pack's own folder `nodes` here.
    nodes: Any = host_nodes
    model, clip, vae = load_demo_model()
    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (PROMPT, ""))
    calls: list[int] = []

    def counting(executor: Any, *inputs: Any, **options: Any) -> Any:
        calls.append(1)
        return executor(*inputs, **options)

    def run(contender: Contender) -> tuple[float, int]:
        calls.clear()
        counted = contender.model.clone()
        counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench", counting)
        latent = nodes.EmptyLatentImage().generate(128, 128, 1)[0]
        start = time.perf_counter()
        nodes.common_ksampler(counted, 1, steps, 5.0, "dpmpp_2m", "karras", positive, negative, latent)
        return time.perf_counter() - start, len(calls)

    field = contenders(model, vae, sizes)
    resident = []
    for contender in field:
        run(contender)
        resident.append(psutil.Process().memory_info().rss / 2**20)
    rounds = [[run(contender) for contender in field] for _ in range(repeats)]
    rows = []
    recording = [
        statistics.median(recording_share(functools.partial(run, contender)) for _ in range(repeats))
        for contender in field
    ]
    for index, contender in enumerate(field):
        seconds = [round_[index][0] for round_ in rounds]
        ratios = [round_[index][0] / round_[0][0] for round_ in rounds]
        made, plain = rounds[0][index][1], rounds[0][0][1]
        rows.append(
            Row(
                contender.method,
                contender.references,
                statistics.median(seconds) / steps,
                statistics.median(ratios),
                made,
                made / plain,
                resident[index],
                recording[index],
            )
        )
    return rows
