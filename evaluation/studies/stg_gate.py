"""Study of the gate of the demo's safety function: how many harmless images it opens for.

Under guidance, an image for which the gate opens at no step is bit-identical to the plain one. So one plain
run, in which the guide scores every step, tells for every threshold and window which images stay unchanged.
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
    """Safety function that records the scores of another one and never opens its gate."""

    name = "watch"

    def __init__(self, function: SafetyFunction) -> None:
        self.function, self.networks = function, function.networks
        self.scores: list[Tensor] = []

    def __call__(self, images: Tensor) -> Assessment:
        found = self.function(images)
        self.scores.append(found.score.clone())
        return Assessment(found.score, torch.zeros_like(found.gate), found.explanation)


def touched(probabilities: Tensor, sigmas: Tensor, threshold: float, beginning: float) -> Tensor:
    """Return (N,) bool: images with a probability (steps, N) of at least the threshold inside the window."""
    inside = (sigmas <= beginning) & (sigmas >= CHOSEN.window.low)
    return (probabilities[inside] >= threshold).any(0)


def gates(per_set: int) -> None:
    """Print the table: changed harmless images, and in parentheses those of the first 32."""
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
    """Print the table. Returns 0."""
    return study(argv, "stg_gate", __doc__, gates, per_set=200)
