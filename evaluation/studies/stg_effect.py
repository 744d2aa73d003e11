"""Study of Safe Text Embedding Guidance and Safe Data Guidance on prompts that no setting was chosen on.

Rows differ in the method and its settings. The guide guides; the judge and a second classifier, which guide
nothing, are asked about the finished images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from ...formats import classifier_file
from ...guidance.core.noise_level import SigmaWindow
from ...guidance.safe_data_guidance import SafeDataGuidanceSettings
from ...guidance.safe_text_guidance import SafeTextGuidanceSettings
from .stg_ablation import (
    BENIGN,
    CHOSEN,
    THRESHOLD,
    Figures,
    Guided,
    bundled_guide,
    star_function,
    study,
    table,
)
from .stg_detectors import SECOND_GUIDE

FIRST = 64
"""Number of the first prompt of each set; settings were chosen on earlier ones."""
SDG = SafeDataGuidanceSettings(strength=3.0, tau=0.0, window=CHOSEN.window)
"""Settings of workflows/demo_sdg.json."""
COLUMNS = (
    "method",
    "gate",
    "window",
    "judge sees",
    "guide sees",
    "second sees",
    "prior preservation",
    "roughness",
    *BENIGN,
)

Settings: TypeAlias = SafeTextGuidanceSettings | SafeDataGuidanceSettings
ROWS: tuple[tuple[float, Settings], ...] = (
    (THRESHOLD, CHOSEN),
    (0.1, replace(CHOSEN, window=SigmaWindow(8.0, 0.2))),
    (THRESHOLD, replace(CHOSEN, rho=0.04)),
    (THRESHOLD, SDG),
    (THRESHOLD, replace(SDG, strength=0.3)),
    (THRESHOLD, replace(SDG, strength=1.0)),
    (THRESHOLD, replace(SDG, strength=1.0, window=SigmaWindow(15.0, 1.0))),
    (THRESHOLD, replace(SDG, strength=1.0, cheap=True)),
)


def label(settings: Settings) -> str:
    """Return the method of a row and its strength."""
    if isinstance(settings, SafeTextGuidanceSettings):
        return f"STG, rho {settings.rho:g}"
    return f"SDG, strength {settings.strength:g}" + (", *cheap*" if settings.cheap else "")


def cells(gate: float, settings: Settings | None, found: Figures) -> tuple[str, ...]:
    """Format a row of the table; without settings that of the plain sampler."""
    named = ("none", "", "")
    if settings is not None:
        named = (label(settings), f"{gate:g}", f"{settings.window.high:g} to {settings.window.low:g}")
    seen = (found.seen(count) for count in (found.judge_sees, *found.guides_see))
    return (*named, *seen, f"{found.preservation:.3f}", f"{found.roughness:.2f}", *found.benign_cells())


def guarded(sampler: Guided, gate: float, settings: Settings) -> Any:
    """Return the demo model with a row's method."""
    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.safe_data_guidance import SafeDataGuidanceCorrection
    from ...nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

    function = star_function(bundled_guide(), gate)
    if isinstance(settings, SafeTextGuidanceSettings):
        return attach(sampler.model, SafeTextGuidanceCorrection(sampler.vae, function, settings))
    return attach(sampler.model, SafeDataGuidanceCorrection(sampler.vae, function, settings))


def effect(per_set: int) -> None:
    """Print the table."""
    with torch.inference_mode(False):
        guides = [bundled_guide(), classifier_file.load(SECOND_GUIDE)]
    sampler = Guided(per_set, guides, first=FIRST)

    def rows() -> Iterator[Sequence[str]]:
        yield cells(0, None, sampler.figures())
        for gate, settings in ROWS:
            yield cells(gate, settings, sampler.figures(guarded(sampler, gate, settings)))

    table(COLUMNS, rows())


def main(argv: Sequence[str]) -> int:
    """Print the table. Returns 0."""
    return study(argv, "stg_effect", __doc__, effect)
