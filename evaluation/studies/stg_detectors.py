"""Study of Safe Text Embedding Guidance on the demo model: adversarial effects, and what reduces them.

The judge still sees some stars that the guiding classifier no longer sees. Rows differ in the guiding
classifier (one, another one with another architecture, images and seed, or both), in the number of views of
the decoded image, and in decoder and window. No method uses the judge.
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
"""Weights for this study only, made by tools/demo_model/train_classifiers.py."""
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
class Variant:
    """Settings of one row: the guiding classifiers, the number of views, the decoder and the window."""

    who: str = "guide"
    views: int = 1
    decoder: str = "vae"
    window: SigmaWindow = CHOSEN.window


VARIANTS = (
    Variant(),
    Variant("second"),
    Variant("sum of both"),
    Variant("maximum of both"),
    Variant(views=4),
    Variant(decoder="linear"),
    Variant("sum of both", views=4),
    Variant(window=NUDITY_WINDOW),
)


def function(who: str, first: SafetyFunction, second: SafetyFunction) -> SafetyFunction:
    """Return the safety function that a row names."""
    if who in ("guide", "second"):
        return first if who == "guide" else second
    return CombinedSafetyFunction([first, second], [1.0, 1.0], "sum" if who.startswith("sum") else "maximum")


def cells(variant: Variant | None, found: Figures) -> tuple[str, ...]:
    """Format a row of the table; without a variant that of the plain sampler."""
    named = (
        ("nobody", "", "", "")
        if variant is None
        else (
            variant.who,
            f"{variant.views}",
            variant.decoder,
            f"{variant.window.high:g} to {variant.window.low:g}",
        )
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
        for variant in VARIANTS:
            judged = function(variant.who, star_function(guides[0]), star_function(guides[1]))
            judged = Views(judged, variant.views) if variant.views > 1 else judged
            correction = SafeTextGuidanceCorrection(
                sampler.vae, judged, replace(CHOSEN, window=variant.window), variant.decoder
            )  # type: ignore[arg-type]
            yield cells(variant, sampler.figures(attach(sampler.model, correction)))

    table(COLUMNS, rows())


def main(argv: Sequence[str]) -> int:
    """Print the table. Returns 0."""
    return study(argv, "stg_detectors", __doc__, detectors)
