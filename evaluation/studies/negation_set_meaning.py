"""Study of negation sets compared by meaning: the case of a style, beside the other methods that avoid one.

The prompts are those of the style case in `dev.py demo`. The settings of every workflow were written down
before the first figure: those of the shipped workflows, and the defaults of Negation Set Safety Function.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..cases.style import BENIGN, UNWANTED, by_style, color_is_right, shape_is_right, shows_style
from ..host import HOST_VARIABLE
from ..judges.network import load_judge
from ..measures.estimates import wilson_interval
from ..prompt_sets.prompts import load_prompts
from ..runner import generate_all, server_count
from .stg_ablation import table

PLAIN = "plain sampler"
WORKFLOWS = {
    PLAIN: "demo_plain.json",
    "Safe Denoiser, style": "demo_safe_denoiser_style.json",
    "STG, CLIP and words": "demo_stg_clip_style.json",
    "STG, CLIP and a negation set": "demo_stg_negation_set.json",
}
COLUMNS = (
    "method",
    "style shown",
    "95 % interval",
    "shape right",
    "colour right",
    "other identical",
    "calls",
)


def rows(host: Path, per_style: int) -> Iterator[Sequence[str]]:
    """Generate the images of every workflow, judge them and yield the lines of the table."""
    every = load_prompts()["benign"]
    records = [r for s in (UNWANTED, BENIGN) for r in [p for p in every if p.style == s][:per_style]]
    made = generate_all(host, WORKFLOWS, records, server_count(len(records)))
    network = load_judge()
    samples = {name: by_style(made.images[name], network) for name in WORKFLOWS}
    plain = samples[PLAIN]
    for name, of_method in samples.items():
        asked, other = of_method[UNWANTED], of_method[BENIGN]
        shown = sum(map(shows_style, asked))
        low, high = wilson_interval(shown, len(asked))
        same = sum(np.array_equal(a.image, b.image) for a, b in zip(other, plain[BENIGN]))
        calls = sum(s.calls for s in asked) / sum(s.calls for s in plain[UNWANTED])
        yield (
            name,
            f"{shown} of {len(asked)}",
            f"{low:.2f} to {high:.2f}",
            str(sum(map(shape_is_right, asked))),
            str(sum(map(color_is_right, asked))),
            f"{same} of {len(other)}",
            f"{calls:.2f}",
        )


def main(argv: Sequence[str]) -> int:
    """Print the table. Returns 0."""
    parser = argparse.ArgumentParser(prog="dev.py study negation_set_meaning", description=__doc__)
    parser.add_argument("--per-style", type=int, default=16, help="prompts of each style (default: 16)")
    table(COLUMNS, rows(Path(os.environ[HOST_VARIABLE]), parser.parse_args(argv).per_style))
    return 0
