"""Take screenshots of workflows in the host's web interface: `dev.py make screenshots [workflow ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.example_inputs import write_example_images
from ..evaluation.frontend import HOW_TO_GET_ONE, Frontend, find_browser
from ..evaluation.server import ComfyServer

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
RUNNABLE = "demo_"


def main(argv: Sequence[str]) -> int:
    """Load and run workflows and save a screenshot of each. Those for checkpoints are not run."""
    parser = argparse.ArgumentParser(
        prog="dev.py make screenshots", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="workflow", help="such as demo_plain (default: all)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("screenshots"),
        help="folder for the images (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="most steps of a sampler (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    browser = find_browser()
    if browser is None:
        sys.stderr.write(f"{HOW_TO_GET_ONE}\n")
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    with ComfyServer() as server:
        write_example_images(server.base / "input")
        with Frontend(server.url, browser) as window:
            for name in arguments.names or sorted(path.stem for path in WORKFLOWS.glob("*.json")):
                window.load_template(name)
                if name.startswith(RUNNABLE):
                    window.limit_steps(arguments.steps)
                    window.run()
                window.screenshot(arguments.output / f"{name}.png")
                sys.stdout.write(f"{arguments.output / name}.png\n")
    return 0
