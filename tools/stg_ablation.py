"""The ablation of rho, tau and gamma of Safe Text Embedding Guidance on the demo model, as a table like the paper's.

Defence success rate: the share of prompts that name or imply the concept whose pictures the judge finds free of it. Prior
preservation: 1 minus the mean absolute difference from the unguarded picture at 64 x 64 pixels (the paper subtracts LPIPS, which
needs a network's weights). The judge guides nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.host import import_host
from ..evaluation.judge import judge
from ..evaluation.judge_network import load_judge
from ..evaluation.prompts import SETS, Record, load_prompts
from ..evaluation.statistics import wilson_interval
from ..guidance.noise_level import SigmaWindow
from ..guidance.safe_text_guidance import SafeTextGuidanceSettings

CHOSEN = SafeTextGuidanceSettings(rho=0.03, tau=0.0, window=SigmaWindow(high=8.0, low=0.2))
"""The settings of workflows/demo_stg.json."""
THRESHOLD = 0.1
COLUMNS = ("rho", "tau", "gamma", "window", "defence success", "95 % interval", "prior preservation", "benign identical")


@dataclass(frozen=True)
class Row:
    """One setting's figures."""

    settings: SafeTextGuidanceSettings
    success: float
    interval: tuple[float, float]
    preservation: float
    identical: float

    def cells(self) -> tuple[str, ...]:
        s, (low, high) = self.settings, self.interval
        return (
            f"{s.rho:g}",
            f"{s.tau:g}",
            f"{s.gamma:g}",
            f"{s.window.high:g} to {s.window.low:g}",
            f"{self.success:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{self.preservation:.3f}",
            f"{self.identical:.2f}",
        )


def variations() -> Iterator[SafeTextGuidanceSettings]:
    """The chosen settings, and those that differ from them in one."""
    yield CHOSEN
    yield from (replace(CHOSEN, rho=rho) for rho in (0.008, 0.015, 0.06))
    yield from (replace(CHOSEN, tau=tau) for tau in (0.69, 2.3))
    yield from (replace(CHOSEN, gamma=gamma) for gamma in (0.2, 0.5))
    yield from (replace(CHOSEN, window=window) for window in (SigmaWindow(6.0, 0.2), SigmaWindow(15.0, 0.2)))


class Sampler:
    """The demo model in this process, drawing all prompts of a set at once."""

    def __init__(self, per_set: int) -> None:
        import nodes as host_nodes

        from ..guidance.classifier import ConvClassifier
        from ..guidance.classifier_safety import ClassifierSafetyFunction
        from ..nodes.host.demo_model import load_demo_model
        from ..nodes.host.folders import ASSETS

        # A type checker sees the pack's own folder `nodes` here.
        self._nodes: Any = host_nodes
        self.model, self._clip, self.vae = load_demo_model()
        with torch.inference_mode(False):
            guide = ConvClassifier.load(ASSETS / "demo_model" / "guide.safetensors")
        self.function = ClassifierSafetyFunction(guide, "shapes", ["star"], THRESHOLD)
        self._records = {name: records[:per_set] for name, records in load_prompts().items()}
        self._judge = load_judge()

    def pictures(self, settings: SafeTextGuidanceSettings | None) -> dict[str, Tensor]:
        """Pictures (N, 3, 128, 128) of every set; None samples without guidance."""
        from ..nodes.host.runs import attach
        from ..nodes.host.safe_text_guidance import SafeTextGuidanceCorrection

        guided = None if settings is None else SafeTextGuidanceCorrection(self.vae, self.function, settings)
        model = self.model if guided is None else attach(self.model, guided)
        return {name: self._draw(model, self._records[name]) for name in SETS}

    def _draw(self, model: Any, records: Sequence[Record]) -> Tensor:
        encode = self._nodes.CLIPTextEncode().encode
        positive = [[torch.cat([encode(self._clip, record.prompt)[0][0][0] for record in records]), {}]]
        negative = [[encode(self._clip, "")[0][0][0].repeat(len(records), 1, 1), {}]]
        latent = {"samples": torch.zeros(len(records), 4, 32, 32)}
        sampled = self._nodes.common_ksampler(model, 7, 20, 5.0, "dpmpp_2m", "karras", positive, negative, latent)[0]
        return self.vae.decode(sampled["samples"]).movedim(-1, 1).clamp(0, 1).clone()  # type: ignore[no-any-return]

    def row(self, settings: SafeTextGuidanceSettings, plain: dict[str, Tensor]) -> Row:
        """One setting against the unguarded pictures."""
        guarded = self.pictures(settings)
        verdicts = [verdict for name in ("named", "implied") for verdict in judge(guarded[name], self._judge)]
        safe = sum(not verdict.unsafe for verdict in verdicts)
        distances = [_distance(guarded[name], plain[name]) for name in ("named", "implied")]
        identical = [torch.equal(a, b) for a, b in zip(guarded["benign"], plain["benign"])]
        interval = wilson_interval(safe, len(verdicts))
        return Row(settings, safe / len(verdicts), interval, 1 - sum(distances) / 2, sum(identical) / len(identical))


def _distance(a: Tensor, b: Tensor) -> float:
    small = (F.interpolate(pictures, (64, 64), mode="area") for pictures in (a, b))
    return float(torch.stack(list(small)).diff(dim=0).abs().mean())


def main(argv: Sequence[str]) -> int:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(prog="dev.py make stg_ablation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--per-set", type=int, default=16, help="prompts of each set")
    per_set = parser.parse_args(argv).per_set
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        with torch.inference_mode():
            sampler = Sampler(per_set)
            plain = sampler.pictures(None)
            _say("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
            for settings in variations():
                _say("| " + " | ".join(sampler.row(settings, plain).cells()) + " |")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
