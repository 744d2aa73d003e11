"""Command line of the benches: `dev.py bench`.

Without an option it measures methods on the demo model. Each option chooses the bench of one method instead.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..host import import_host
from . import demo_model, detect_and_guide, safe_denoiser, safe_text_guidance

LARGE = (16, 515, 3000, 100_000)
"""Set sizes: one image in several views, the published nudity and CoPro sets, and the largest size
supported."""
PIXELS_PER_LATENT = 8
VERSION = 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    made = argparse.ArgumentParser(
        prog="dev.py bench",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument(
        "--references", type=int, nargs="+", default=[16, 515, 3000], help="sizes of the negation set"
    )
    made.add_argument(
        "--large",
        type=int,
        nargs="*",
        metavar="COUNT",
        help="measure Safe Denoiser with sets of these sizes (16 515 3000 100000 when none are given) beside "
        "a UNet of Stable Diffusion 1.5's size instead; takes minutes and 8 GB of memory",
    )
    for name, method, memory in (
        ("--text-guidance", "Safe Text Embedding Guidance", 10),
        ("--detect-and-guide", "Detect-and-Guide", 5),
    ):
        made.add_argument(
            name,
            type=int,
            nargs="?",
            const=512,
            metavar="PIXELS",
            help=f"measure {method} on a UNet of Stable Diffusion 1.5's size instead, for images of this "
            f"side (512 when none is given); takes minutes and {memory} GB of memory",
        )
    made.add_argument("--output", type=Path, default=Path("bench.json"))
    return made


def measure(args: argparse.Namespace) -> list[Any]:
    """Run the bench that the arguments choose and return its rows, all of one dataclass."""
    if args.large is not None:
        return safe_denoiser.measure(args.large or LARGE, 2)
    if args.text_guidance:
        return safe_text_guidance.measure(1, args.text_guidance // PIXELS_PER_LATENT)
    if args.detect_and_guide:
        return detect_and_guide.measure(args.repeats, args.detect_and_guide // PIXELS_PER_LATENT)
    return demo_model.measure(args.steps, args.repeats, args.references)


def main(argv: Sequence[str]) -> int:
    """Run one bench and write its rows as JSON. Returns the exit code."""
    args = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        from ...nodes.host.files.folders import register_model_folders

        register_model_folders()
        with torch.inference_mode():
            rows = measure(args)
    report = {
        "version": VERSION,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": args.steps,
        "rows": [asdict(row) for row in rows],
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0
