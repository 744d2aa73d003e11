"""Study of Safe Denoiser on the demo model: its modes, the published procedure, and ablations.

Two tables: the modes under the workflow's sampler; and the published procedure, an ancestral sampler that
adds fresh noise to the prediction, with a control that only adds noise and subtracts nothing. Two curves: the
number of references and the threshold. No method uses the judge.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...formats.layouts import PLAIN, Layout
from ...formats.negation_set import NegationSet, load
from ...guidance.core.noise_level import SigmaWindow
from ...guidance.core.references import References, evenly_spread, unit_pixels
from ...guidance.safe_denoiser.official import published_delta
from ...guidance.safe_denoiser.settings import OFFICIAL_WINDOW, SafeDenoiserSettings
from ..host import import_host
from ..in_process_sampler import InProcessSampler
from ..judges.judge import judge, matches
from ..judges.network import load_judge
from ..prompt_sets.prompts import SETS, load_prompts

LOCAL = SafeDenoiserSettings(
    strength=1.2, window=SigmaWindow(low=0.15), threshold=0.7, temperature=0.1, cap=2.0
)
"""Settings of workflows/demo_safe_denoiser.json."""
WHOLE = SafeDenoiserSettings()
STRONG = replace(WHOLE, strength=1.0, window=SigmaWindow(low=1.0))
KAPPA, SCALE = 6.45, 0.33
"""The published nudity setting of Stable Diffusion 1.4."""
COLUMNS = ("setting", "named", "implied", "benign identical", "benign right", "benign change")

Sampler = Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """Figures of one setting.

    Attributes:
        count: prompts of each set.
        named, implied: images with a star, by the judge.
        identical: benign images that are bit-identical to those without the method.
        right: benign images that show what the text states.
        change: mean absolute change of benign images.
    """

    setting: str
    count: int
    named: int
    implied: int
    identical: int
    right: int
    change: float

    def cells(self) -> tuple[str, ...]:
        """Format the figures as cells of the table."""
        counts = (self.named, self.implied, self.identical, self.right)
        return (self.setting, *(f"{count}/{self.count}" for count in counts), f"{self.change:.4f}")


def without_masks(negation_set: NegationSet) -> NegationSet:
    """Remove the masks, so that images are compared as a whole."""
    return replace(negation_set, masks=(None,) * len(negation_set))


def first(negation_set: NegationSet, count: int) -> NegationSet:
    """Return a smaller set of images spread evenly over the set."""
    chosen = evenly_spread(len(negation_set), count).tolist()
    return replace(
        negation_set,
        images=tuple(negation_set.images[i] for i in chosen),
        masks=tuple(negation_set.masks[i] for i in chosen),
    )


def ancestral(references: References | None, scale: float) -> Sampler:
    """Make a sampler of DDPM's ancestral steps in variance-exploding coordinates, as published.

    Inside the published window the procedure subtracts scale * E_unsafe from the prediction, adds fresh noise
    to it, and steps with the old noise prediction. Without references it adds no fresh noise. The fresh noise
    has its own generator, so that the ancestral noise stays the same.
    """

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any = None,
        callback: Any = None,
        disable: Any = None,
    ) -> Tensor:
        steps, fresh = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        for sigma, following in zip(sigmas[:-1], sigmas[1:]):
            denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
            noise = (x - denoised) / sigma
            if references is not None and sigma >= OFFICIAL_WINDOW.low:
                denoised = denoised + published_delta(denoised, references, KAPPA, scale)
                x = denoised + sigma * torch.randn(x.shape, generator=fresh)
                denoised = x - sigma * noise
            share = (following / sigma) ** 2
            x = share * x + (1 - share) * denoised
            x = x + following * (1 - share).sqrt() * torch.randn(x.shape, generator=steps)
        return x

    return sample


class Experiment:
    """The demo model on the prompts of every set, with any settings of Safe Denoiser, and its figures."""

    def __init__(self, per_set: int) -> None:
        from ...nodes.host.files.folders import ASSETS

        self._sampler = InProcessSampler()
        self.model, self.vae = self._sampler.model, self._sampler.vae
        self.stars = load(ASSETS / "negation_sets" / "demo_star.safetensors")
        self._records = {name: records[:per_set] for name, records in load_prompts().items()}
        self._judge = load_judge()
        self._count = per_set
        self._measured: dict[tuple[SafeDenoiserSettings, str], Row] = {}

    def images(self, model: Any, sampler: Sampler | None = None) -> dict[str, Tensor]:
        """Sample images (N, 3, 128, 128) of every set.

        A given sampler runs on the noise schedule of the published code.
        """
        import comfy.samplers

        options = (
            {} if sampler is None else {"sampler": comfy.samplers.KSAMPLER(sampler), "scheduler": "normal"}
        )
        return {name: self._sampler.draw(model, self._records[name], **options) for name in SETS}

    def protected(
        self, settings: SafeDenoiserSettings, negation_set: NegationSet, layout: Layout = PLAIN
    ) -> Any:
        """Return the demo model with Safe Denoiser."""
        from ...nodes.host.engine.hooks import attach
        from ...nodes.host.methods.safe_denoiser import SafeDenoiserCorrection

        return attach(self.model, SafeDenoiserCorrection(negation_set, self.vae, settings, layout))

    def references(self) -> References:
        """Return the star images as the published code normalises them."""
        from ...nodes.host.engine.frames import Frames
        from ...nodes.host.files.negation_latents import references_for

        stars = without_masks(self.stars)
        return references_for(self.model, self.vae, stars, Frames.of([(1, 4, 32, 32)])).then(unit_pixels)

    def measured(
        self,
        setting: str,
        settings: SafeDenoiserSettings,
        negation_set: NegationSet,
        plain: dict[str, Tensor],
    ) -> Row:
        """Measure Safe Denoiser with some settings and set. Rows of several tables are measured once."""
        key = (settings, negation_set.content_hash)
        if key not in self._measured:
            self._measured[key] = self.row(
                setting, self.images(self.protected(settings, negation_set)), plain
            )
        return replace(self._measured[key], setting=setting)

    def row(self, setting: str, images: dict[str, Tensor], plain: dict[str, Tensor]) -> Row:
        """Compare one setting's images with the unguarded ones of the same sampler."""
        verdicts = {name: judge(images[name], self._judge) for name in SETS}
        unsafe = {name: sum(bool(v.unsafe) for v in verdicts[name]) for name in SETS}
        right = sum(matches(v, record) for v, record in zip(verdicts["benign"], self._records["benign"]))
        pairs = list(zip(images["benign"], plain["benign"]))
        identical = sum(torch.equal(a, b) for a, b in pairs)
        change = sum(float((a - b).abs().mean()) for a, b in pairs) / self._count
        return Row(setting, self._count, unsafe["named"], unsafe["implied"], identical, right, change)


def mode_rows(experiment: Experiment, plain: dict[str, Tensor]) -> Iterator[Row]:
    """Yield every mode with its own defaults, under the workflow's sampler."""
    whole = without_masks(experiment.stars)
    modes: list[tuple[str, SafeDenoiserSettings, NegationSet]] = [
        ("calibrated, local (masks)", LOCAL, experiment.stars),
        ("calibrated, whole images", WHOLE, whole),
        ("calibrated, whole images, strength 1, to sigma 1", STRONG, whole),
        ("exact", replace(WHOLE, mode="exact", strength=1.0), whole),
        ("tempered", replace(WHOLE, mode="tempered", strength=1.0), whole),
        ("official, subtracts only", replace(WHOLE, mode="official", strength=SCALE, kappa=KAPPA), whole),
    ]
    yield experiment.row("none", plain, plain)
    for name, settings, negation_set in modes:
        yield experiment.measured(name, settings, negation_set, plain)
    augmented = experiment.protected(STRONG, whole, Layout("crop", "flip, crops and shifts"))
    yield experiment.row(
        "whole images, strength 1, to sigma 1, 18 copies of each", experiment.images(augmented), plain
    )


def published_rows(experiment: Experiment) -> Iterator[Row]:
    """Yield the published procedure, also with scale 0, where it subtracts nothing."""
    plain = experiment.images(experiment.model, ancestral(None, 0.0))
    yield experiment.row("none", plain, plain)
    for name, scale in (
        ("noises anew only (scale 0)", 0.0),
        (f"published (scale {SCALE:g})", SCALE),
        ("published, scale 1", 1.0),
    ):
        yield experiment.row(
            name, experiment.images(experiment.model, ancestral(experiment.references(), scale)), plain
        )


def reference_rows(experiment: Experiment, plain: dict[str, Tensor]) -> Iterator[Row]:
    """Yield the local mode with smaller sets."""
    for count in (4, 8, 16, 32, 64, len(experiment.stars)):
        yield experiment.measured(str(count), LOCAL, first(experiment.stars, count), plain)


def threshold_rows(experiment: Experiment, plain: dict[str, Tensor]) -> Iterator[Row]:
    """Yield the local mode with other thresholds."""
    for threshold in (0.2, 0.4, 0.6, LOCAL.threshold, 0.8, 1.0):
        yield experiment.measured(
            f"{threshold:g}", replace(LOCAL, threshold=threshold), experiment.stars, plain
        )


def main(argv: Sequence[str]) -> int:
    """Print the tables line by line, and write all figures as JSON and the curves as an image."""
    parser = argparse.ArgumentParser(
        prog="dev.py study safe_denoiser", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--per-set", type=int, default=24, help="prompts of each set")
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), help="folder for safe_denoiser_study.json and .png"
    )
    args = parser.parse_args(argv)
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        with torch.inference_mode():
            experiment = Experiment(args.per_set)
            plain = experiment.images(experiment.model)
            tables = {
                "modes": mode_rows(experiment, plain),
                "published": published_rows(experiment),
                "references": reference_rows(experiment, plain),
                "threshold": threshold_rows(experiment, plain),
            }
            for table, rows in tables.items():
                _say(f"\n{table}\n\n| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
                found[table] = []
                for row in rows:
                    found[table].append(row)
                    _say("| " + " | ".join(row.cells()) + " |")
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"version": 1, **{part: [asdict(row) for row in rows] for part, rows in found.items()}}
    (args.output / "safe_denoiser_study.json").write_text(
        json.dumps(report, indent=1) + "\n", encoding="utf-8"
    )
    plot(found["references"], found["threshold"], args.output / "safe_denoiser_study.png")
    return 0


def plot(references: Sequence[Row], thresholds: Sequence[Row], path: Path) -> None:
    """Plot unsafe images and identical benign images over the number of references and the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, rows, label in zip(
        figure.subplots(1, 2), (references, thresholds), ("references", "threshold")
    ):
        values = [float(row.setting) for row in rows]
        axes.plot(
            values,
            [50 * (row.named + row.implied) / row.count for row in rows],
            "o-",
            label="star shown, named and implied",
        )
        axes.plot(
            values, [100 * row.identical / row.count for row in rows], "s--", label="benign bit-identical"
        )
        axes.set(
            xlabel=label,
            ylabel="% of images",
            ylim=(-3, 103),
            xscale="log" if label == "references" else "linear",
        )
        axes.set_xticks(values, [row.setting for row in rows], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
