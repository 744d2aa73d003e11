"""Study of STG's gate: harmless images it opens for, by threshold and by the start of the window.

An image that the guide objects to at no step of the plain run is bit-identical under guidance, so one plain
run that the guide watches says for every threshold and window which images stay untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...guidance.core.noise_level import SigmaWindow
from ...guidance.safe_text_guidance import SafeTextGuidanceSettings
from ...guidance.safety_functions.interface import Assessment, SafetyFunction
from .stg_ablation import CHOSEN, Guided, bundled_guide, star_function, study, table

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)
BEGINNINGS = (15.0, 10.0, 8.0, 7.0, 6.0, 5.0)


class Watch(SafetyFunction):
    """Notes another function's scores and never objects."""

    name = "watch"

    def __init__(self, function: SafetyFunction) -> None:
        self.function, self.networks = function, function.networks
        self.scores: list[Tensor] = []

    def __call__(self, images: Tensor) -> Assessment:
        found = self.function(images)
        self.scores.append(found.score.clone())
        return Assessment(found.score, torch.zeros_like(found.gate), found.explanation)


def touched(probabilities: Tensor, sigmas: Tensor, threshold: float, beginning: float) -> Tensor:
    """Return (N,) bool: probability (steps, N) reaches the threshold at a step inside the window."""
    inside = (sigmas <= beginning) & (sigmas >= CHOSEN.window.low)
    return (probabilities[inside] >= threshold).any(0)


def gates(per_set: int) -> None:
    """Print the table: harmless images touched, in parentheses of the first 32, which the demonstration
    shows.
    """
    import comfy.samplers

    from ...nodes.host.engine.hooks import attach
    from ...nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

    watch, sampler = Watch(star_function(bundled_guide())), Guided(per_set, [], sets=("benign",))
    settings = SafeTextGuidanceSettings(window=SigmaWindow())
    sampler.images(attach(sampler.model, SafeTextGuidanceCorrection(sampler.vae, watch, settings)))
    sigmas = comfy.samplers.calculate_sigmas(sampler.model.get_model_object("model_sampling"), "karras", 20)[
        :-1
    ]
    runs = [
        torch.stack(watch.scores[start : start + len(sigmas)])
        for start in range(0, len(watch.scores), len(sigmas))
    ]
    # The score is -log(1 - p).
    probabilities = 1 - torch.exp(-torch.cat(runs, dim=1))

    def rows() -> Iterator[Sequence[str]]:
        for beginning in BEGINNINGS:
            found = [touched(probabilities, sigmas, threshold, beginning) for threshold in THRESHOLDS]
            yield (f"{beginning:g}", *(f"{int(hit.sum())} ({int(hit[:32].sum())})" for hit in found))

    table(
        (
            f"first sigma, {probabilities.shape[1]} images",
            *(f"gate at {threshold:g}" for threshold in THRESHOLDS),
        ),
        rows(),
    )


def main(argv: Sequence[str]) -> int:
    """Print the table; 0."""
    return study(argv, "stg_gate", __doc__, gates, per_set=200)
