"""Study of memorised images: distances of an over-trained LoRA's images to its training images.

It compares methods and settings with the bundled LoRA (tools/demo_model/train_memorised_lora.py). Seeds and
benign prompts are not those of the demonstration. The judge, which no method uses, decides whether an image
still shows the shape and colour that the text asks for. Takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...formats.negation_set import load
from ...guidance.core.noise_level import SigmaWindow
from ...guidance.safe_denoiser.settings import SafeDenoiserSettings
from ...guidance.spell import SpellSettings
from ..cases import memorisation as case
from ..host import import_host
from ..in_process_sampler import InProcessSampler
from ..judges.judge import judge, matches
from ..judges.network import load_judge
from ..prompt_sets.prompts import Record, load_prompts

SEEDS = range(4)
"""Positions in a batch, each with other noise."""
NOISE_SEED = 777
BENIGN = slice(40, 48)
SHOWN = ("without the LoRA", "LoRA alone", "Safe Denoiser", "SPELL")
"""Rows in the plot."""

SAFE_DENOISER = SafeDenoiserSettings(
    strength=4.0, window=SigmaWindow(low=0.5), threshold=1.0, temperature=0.02, cap=2.0
)
SPELL = SpellSettings(radius=0.6)
"""Settings of the two workflows."""


@dataclass(frozen=True)
class Row:
    """Figures of one model.

    Attributes:
        distances, similarities: of each image to the nearest training image.
        near_copies: images that are near-copies.
        same_kind: images that show the shape and colour of the caption.
        benign: number of benign images.
        benign_right: benign images that show what the text states.
        benign_identical: benign images that are bit-identical to those of the LoRA without a method.
    """

    name: str
    distances: tuple[float, ...]
    similarities: tuple[float, ...]
    near_copies: int
    same_kind: int
    benign: int
    benign_right: int
    benign_identical: int


class Experiment:
    """The demo model with and without the LoRA, and the figures of its images."""

    def __init__(self, cfg: float) -> None:
        import comfy.sd
        import comfy.utils

        self._cfg, self._judge = cfg, load_judge()
        self._sampler = InProcessSampler()
        self.model, self._vae = self._sampler.model, self._sampler.vae
        self.memorised = comfy.sd.load_lora_for_models(
            self.model, None, comfy.utils.load_torch_file(str(case.LORA)), 1.0, 0.0
        )[0]
        self._set, self._images = load(case.TRAINING_SET), case.training_images()
        self._benign = load_prompts()["benign"][BENIGN]
        self._alone = self._draw(self.memorised, self._benign)

    def row(self, name: str, model: Any) -> Row:
        """Sample with a model and return its figures."""
        records = case.memorised_records(SEEDS)
        drawn, benign = self._draw(model, records), self._draw(model, self._benign)
        images = [image.numpy() for image in _bytes(drawn)]
        distances = tuple(case.nearest_distance(image, self._images) for image in images)
        similarities = tuple(case.nearest_similarity(image, self._images) for image in images)
        identical = sum(torch.equal(a, b) for a, b in zip(_bytes(benign), _bytes(self._alone)))
        copies = sum(case.is_near_copy(*pair) for pair in zip(distances, similarities))
        same_kind, benign_right = self._right(drawn, records), self._right(benign, self._benign)
        return Row(name, distances, similarities, copies, same_kind, len(benign), benign_right, identical)

    def safe_denoiser(self, **changes: Any) -> Any:
        """Return the model with the LoRA and Safe Denoiser, with changed settings."""
        from ...nodes.host.engine.hooks import attach
        from ...nodes.host.methods.safe_denoiser import SafeDenoiserCorrection

        return attach(
            self.memorised, SafeDenoiserCorrection(self._set, self._vae, replace(SAFE_DENOISER, **changes))
        )

    def spell(self, **changes: Any) -> Any:
        """Return the model with the LoRA and SPELL, with changed settings."""
        from ...nodes.host.engine.hooks import attach
        from ...nodes.host.methods.spell import SpellCorrection

        return attach(self.memorised, SpellCorrection(self._set, self._vae, replace(SPELL, **changes)))

    def _right(self, drawn: Tensor, records: Sequence[Record]) -> int:
        return sum(matches(verdict, record) for verdict, record in zip(judge(drawn, self._judge), records))

    def _draw(self, model: Any, records: Sequence[Record]) -> Tensor:
        import comfy.sample

        noise = comfy.sample.prepare_noise(torch.zeros(len(records), 4, 32, 32), NOISE_SEED)
        return self._sampler.draw(model, records, cfg=self._cfg, noise=noise)


def _bytes(images: Tensor) -> Tensor:
    return (images.movedim(1, -1) * 255).byte()


def measure(cfg: float) -> list[Row]:
    """Measure all rows. The host must be imported."""
    with torch.inference_mode():
        experiment = Experiment(cfg)
        models = {
            SHOWN[0]: experiment.model,
            SHOWN[1]: experiment.memorised,
            SHOWN[2]: experiment.safe_denoiser(),
        }
        models |= {f"strength {value:g}": experiment.safe_denoiser(strength=value) for value in (1.0, 2.0)}
        models |= {
            f"down to sigma {low:g}": experiment.safe_denoiser(window=SigmaWindow(low=low))
            for low in (2.0, 1.0)
        }
        models |= {mode: experiment.safe_denoiser(mode=mode) for mode in ("exact", "tempered")}
        models[SHOWN[3]] = experiment.spell()
        models |= {f"radius {value:g}": experiment.spell(radius=value) for value in (0.3, 0.45)}
        return [_printed(experiment.row(name, model)) for name, model in models.items()]


def _printed(row: Row) -> Row:
    count, spread = len(row.distances), case.distribution(row.distances)
    sys.stdout.write(
        f"| {row.name} | {spread['mean']:.3f} | {spread['least']:.3f} | {spread['median']:.3f} | "
        f"{spread['greatest']:.3f} | "
        f"{max(row.similarities):.2f} | {row.near_copies} of {count} | {row.same_kind} of {count} | "
        f"{row.benign_right} of {row.benign} | "
        f"{row.benign_identical} of {row.benign} |\n"
    )
    sys.stdout.flush()
    return row


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the sorted distances of the main rows, and the limit of near-copies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, style in zip(SHOWN, ("--", "o-", "s-", "^-")):
        distances = sorted(next(row for row in rows if row.name == name).distances)
        axes.plot(
            [100 * (i + 1) / len(distances) for i in range(len(distances))],
            distances,
            style,
            label=name,
            markersize=4,
        )
    axes.axhline(case.NEAR_COPY, color="0.6", linewidth=1)
    axes.text(100, case.NEAR_COPY, "near-copies below", ha="right", va="bottom", color="0.4", fontsize=8)
    axes.set(xlabel="images, %", ylabel="distance to nearest training image", ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> int:
    """Print the figures as rows of a table, and write them as JSON and as a plot."""
    parser = argparse.ArgumentParser(
        prog="dev.py study memorisation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs"),
        help="folder for safe_denoiser_memorisation.png and .json",
    )
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        import_host(Path(base))
        rows = measure(args.cfg)
    plot(rows, args.output / "safe_denoiser_memorisation.png")
    report = {
        "version": 2,
        "near_copy": [case.NEAR_COPY, case.COPY_SIMILARITY],
        "rows": [asdict(row) for row in rows],
    }
    (args.output / "safe_denoiser_memorisation.json").write_text(
        json.dumps(report, indent=1) + "\n", encoding="utf-8"
    )
    return 0
