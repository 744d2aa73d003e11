"""Study of STG: the adversarial share of its effect on the demo model, and remedies.

Part of what the guiding classifier no longer sees the judge still does. Rows differ in who guides (a
classifier, another one with another architecture, images and seed, both), in how many views of the decoded
image are judged together, and in decoder and window. The judge guides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...formats import classifier_file
from ...guidance.core.noise_level import SigmaWindow
from ...guidance.safe_text_guidance import NUDITY_WINDOW
from ...guidance.safety_functions.interface import CombinedSafetyFunction, SafetyFunction
from ...guidance.safety_functions.multi_view import Views
from .stg_ablation import BENIGN, CHOSEN, Figures, Guided, bundled_guide, star_function, study, table

SECOND_GUIDE = Path(__file__).resolve().parents[1] / "judges" / "second_guide.safetensors"
"""Made by tools/demo_model/train_classifiers.py; for this study only."""
COLUMNS = (
    "who guides",
    "views",
    "decoder",
    "window",
    "judge sees",
    "guide sees",
    "second sees",
    "prior preservation",
    *BENIGN,
)


@dataclass(frozen=True)
class Way:
    """Safety function and decoder of a row."""

    who: str = "guide"
    views: int = 1
    decoder: str = "vae"
    window: SigmaWindow = CHOSEN.window


WAYS = (
    Way(),
    Way("second"),
    Way("sum of both"),
    Way("maximum of both"),
    Way(views=4),
    Way(decoder="linear"),
    Way("sum of both", views=4),
    Way(window=NUDITY_WINDOW),
)


def function(who: str, first: SafetyFunction, second: SafetyFunction) -> SafetyFunction:
    """Return the safety function that a row names."""
    if who in ("guide", "second"):
        return first if who == "guide" else second
    return CombinedSafetyFunction([first, second], [1.0, 1.0], "sum" if who.startswith("sum") else "maximum")


def cells(way: Way | None, found: Figures) -> tuple[str, ...]:
    """Format a row of the table; without a variant, the row of the plain sampler."""
    named = (
        ("nobody", "", "", "")
        if way is None
        else (way.who, f"{way.views}", way.decoder, f"{way.window.high:g} to {way.window.low:g}")
    )
    seen = (found.seen(count) for count in (found.judge_sees, *found.guides_see))
    return (*named, *seen, f"{found.preservation:.3f}", *found.benign_cells())


def detectors(per_set: int) -> None:
    """Print the table."""
    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

    with torch.inference_mode(False):
        guides = [bundled_guide(), classifier_file.load(SECOND_GUIDE)]
    sampler = Guided(per_set, guides)

    def rows() -> Iterator[Sequence[str]]:
        yield cells(None, sampler.figures())
        for way in WAYS:
            judged = function(way.who, star_function(guides[0]), star_function(guides[1]))
            judged = Views(judged, way.views) if way.views > 1 else judged
            correction = SafeTextGuidanceCorrection(
                sampler.vae, judged, replace(CHOSEN, window=way.window), way.decoder
            )  # type: ignore[arg-type]
            yield cells(way, sampler.figures(attach(sampler.model, correction)))

    table(COLUMNS, rows())


def main(argv: Sequence[str]) -> int:
    """Print the table; 0."""
    return study(argv, "stg_detectors", __doc__, detectors)
