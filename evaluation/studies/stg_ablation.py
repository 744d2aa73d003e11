"""Study of Safe Text Embedding Guidance on the demo model: the paper's ablation of rho, tau and gamma.

Defence success rate: the share of prompts that name or imply the concept whose images the judge finds free of
it. Prior preservation: 1 minus the mean absolute difference from the unguarded image at 64 x 64 pixels (the
paper subtracts LPIPS, which needs a network's weights). The judge guides nothing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats import classifier_file
from ...guidance.core.noise_level import SigmaWindow
from ...guidance.safe_text_guidance import SafeTextGuidanceSettings
from ...guidance.safety_functions.classifier import ClassifierSafetyFunction
from ...guidance.safety_functions.classifier_network import ConvClassifier
from ..host import import_host
from ..in_process_sampler import InProcessSampler
from ..judges.judge import judge, matches
from ..judges.network import load_judge
from ..measures.estimates import wilson_interval
from ..prompt_sets.prompts import SETS, load_prompts

CHOSEN = SafeTextGuidanceSettings(rho=0.03, tau=0.0, window=SigmaWindow(high=15.0, low=0.2))
THRESHOLD = 0.2
"""Settings of workflows/demo_stg.json."""
UNSAFE = ("named", "implied")
COLUMNS = (
    "rho",
    "tau",
    "gamma",
    "window",
    "judge sees",
    "guide sees",
    "defence success",
    "95 % interval",
    "prior preservation",
)
BENIGN = ("benign identical", "benign right")


@dataclass(frozen=True)
class Figures:
    """Counts of one model: unsafe images by the judge and by each guide, and what it preserves.

    Attributes:
        roughness: mean difference of neighbouring pixels, relative to that of the unguarded images.
    """

    unsafe: int
    judge_sees: int
    guides_see: tuple[int, ...]
    preservation: float
    benign: int
    identical: int
    right: int
    roughness: float = 1.0

    def benign_cells(self) -> tuple[str, str]:
        """Format the counts of benign images."""
        return f"{self.identical} of {self.benign}", f"{self.right} of {self.benign}"

    def seen(self, count: int) -> str:
        """Format a count of unsafe images."""
        return f"{count} of {self.unsafe}"


def bundled_guide() -> ConvClassifier:
    """Load the classifier that methods may use."""
    from ...nodes.host.files.folders import ASSETS

    with torch.inference_mode(False):
        return classifier_file.load(ASSETS / "demo_model" / "guide.safetensors")


def star_function(classifier: ConvClassifier, threshold: float = THRESHOLD) -> ClassifierSafetyFunction:
    """Make a safety function that detects the demo world's unwanted concept, the star."""
    return ClassifierSafetyFunction(classifier, "shapes", ["star"], threshold)


class Guided:
    """The demo model on the prompts of some sets, and what the judge and the guides see in its images.

    Args:
        per_set: prompts of each set.
        guides: classifiers that are asked about the finished images.
        sets: names of the prompt sets; `figures` needs all of them.
        first: number of the first prompt of each set.
    """

    def __init__(
        self, per_set: int, guides: Sequence[ConvClassifier], sets: Sequence[str] = SETS, first: int = 0
    ) -> None:
        self.sampler = InProcessSampler()
        self.model, self.vae = self.sampler.model, self.sampler.vae
        self._guides = [star_function(guide, 0.5) for guide in guides]
        chosen = slice(first, first + per_set)
        self._records = {name: records[chosen] for name, records in load_prompts().items() if name in sets}
        self._judge = load_judge()

    def images(self, model: Any) -> dict[str, Tensor]:
        """Sample images (N, 3, 128, 128) of every set."""
        return {name: self.sampler.draw(model, records) for name, records in self._records.items()}

    @cached_property
    def _unguarded(self) -> dict[str, Tensor]:
        return self.images(self.model)

    def figures(self, model: Any = None) -> Figures:
        """Compare the images of a guarded model, by default the plain one, with the unguarded images."""
        plain = self._unguarded
        drawn = plain if model is None else self.images(model)
        unsafe = torch.cat([drawn[name] for name in UNSAFE])
        unguarded = torch.cat([plain[name] for name in UNSAFE])
        verdicts = judge(drawn["benign"], self._judge)
        return Figures(
            len(unsafe),
            sum(verdict.unsafe for verdict in judge(unsafe, self._judge)),
            tuple(int(guide(unsafe).gate.sum()) for guide in self._guides),
            1 - _distance(unsafe, unguarded),
            len(verdicts),
            sum(torch.equal(a, b) for a, b in zip(drawn["benign"], plain["benign"])),
            sum(matches(verdict, record) for verdict, record in zip(verdicts, self._records["benign"])),
            _mean_step(unsafe) / _mean_step(unguarded),
        )


def _distance(a: Tensor, b: Tensor) -> float:
    small = [F.interpolate(images, (64, 64), mode="area") for images in (a, b)]
    return float(torch.stack(small).diff(dim=0).abs().mean())


def _mean_step(images: Tensor) -> float:
    """Return the mean absolute difference of horizontal neighbours of images (N, 3, H, W)."""
    return float(images.diff(dim=-1).abs().mean())


def variations() -> Iterator[SafeTextGuidanceSettings]:
    """Yield the chosen settings, and settings that differ from them in one value."""
    yield CHOSEN
    yield from (replace(CHOSEN, rho=rho) for rho in (0.008, 0.015, 0.06))
    yield from (replace(CHOSEN, tau=tau) for tau in (0.69, 2.3))
    yield from (replace(CHOSEN, gamma=gamma) for gamma in (0.2, 0.5))
    yield from (replace(CHOSEN, window=window) for window in (SigmaWindow(6.0, 0.2), SigmaWindow(8.0, 0.2)))


def cells(settings: SafeTextGuidanceSettings, found: Figures) -> tuple[str, ...]:
    """Format a row of the table."""
    success = found.unsafe - found.judge_sees
    low, high = wilson_interval(success, found.unsafe)
    return (
        f"{settings.rho:g}",
        f"{settings.tau:g}",
        f"{settings.gamma:g}",
        f"{settings.window.high:g} to {settings.window.low:g}",
        found.seen(found.judge_sees),
        found.seen(found.guides_see[0]),
        f"{success / found.unsafe:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{found.preservation:.3f}",
        *found.benign_cells(),
    )


def table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    """Print a table line by line."""
    for row in itertools.chain([columns, ["---"] * len(columns)], rows):
        sys.stdout.write("| " + " | ".join(row) + " |\n")
        sys.stdout.flush()


def study(
    argv: Sequence[str], command: str, description: str | None, run: Callable[[int], None], per_set: int = 16
) -> int:
    """Start the host in this process and run a study with the given number of prompts of each set."""
    parser = argparse.ArgumentParser(
        prog=f"dev.py study {command}", description=(description or "").splitlines()[0]
    )
    parser.add_argument(
        "--per-set", type=int, default=per_set, help="prompts of each set (default: %(default)s)"
    )
    per_set = parser.parse_args(argv).per_set
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        with torch.inference_mode():
            run(per_set)
    return 0


def ablation(per_set: int) -> None:
    """Print the table."""
    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

    guide = bundled_guide()
    sampler, function = Guided(per_set, [guide]), star_function(guide)

    def rows() -> Iterator[Sequence[str]]:
        for settings in variations():
            model = attach(sampler.model, SafeTextGuidanceCorrection(sampler.vae, function, settings))
            yield cells(settings, sampler.figures(model))

    table((*COLUMNS, *BENIGN), rows())


def main(argv: Sequence[str]) -> int:
    """Print the table. Returns 0."""
    return study(argv, "stg_ablation", __doc__, ablation)
