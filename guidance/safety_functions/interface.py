"""Interface of safety functions, which give images a differentiable unsafe score.

Several of them can be combined into one.

The papers increase g = -U. Here guidance decreases U, the unsafe score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Region:
    """Region with unsafe content.

    Attributes:
        label: name of the content.
        score: the detector's confidence, 0 to 1.
        box: left, top, right, bottom as shares of the image's width and height.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Assessment:
    """Result of a safety function for a batch of images.

    Attributes:
        score: (B,) float32 from 0 on, larger is less safe; gradients flow through it to the images.
        gate: (B,) bool, True for images that are unsafe enough to act on.
        explanation: for every image, figures by name, for people and fit for JSON.
        regions: for every image, the regions found; an empty list for functions that assess the whole image.
        measure: (B,) on the scale of the function's own threshold, if that is not the score's: what people
            read, and what is compared with further thresholds.
    """

    score: Tensor
    gate: Tensor
    explanation: list[dict[str, Any]]
    regions: list[list[Region]] = field(default_factory=list)
    measure: Tensor | None = None

    @property
    def level(self) -> Tensor:
        """Return the measure, (B,), which is the score for most functions."""
        return self.score if self.measure is None else self.measure

    def regions_of(self, index: int) -> list[Region]:
        """Return the regions of one image."""
        return self.regions[index] if self.regions else []


class SafetyFunction(ABC):
    """Scores images.

    It must be differentiable, treat every image of a batch independently, and draw no random numbers.
    """

    name: str
    note: str = ""
    """A sentence on what its verdicts do not mean, for people; empty for most functions."""
    networks: Sequence[nn.Module] = ()
    """All modules with weights, which the host loads and makes differentiable."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Assessment:
        """Assess images (B, 3, H, W) of any size, nominally in [0, 1]; decoders may exceed that range."""


Combination = Literal["sum", "maximum"]


class CombinedSafetyFunction(SafetyFunction):
    """Several safety functions as one. Its gate opens when the gate of any function with a weight opens.

    A measure below 0 counts as 0, so that no function hides what another one finds.

    Args:
        functions: at least one.
        weights: one per function, a factor of its score.
        combination: the sum or the maximum of the weighted scores.

    Raises:
        ValueError: there is no function, or another number of weights.
    """

    def __init__(
        self, functions: Sequence[SafetyFunction], weights: Sequence[float], combination: Combination = "sum"
    ) -> None:
        if not functions:
            raise ValueError("There is no safety function to combine. Connect at least one.")
        if len(weights) != len(functions):
            raise ValueError(
                f"There are {len(weights)} weights for {len(functions)} safety functions. Give one for each."
            )
        self.functions, self.weights, self.combination = tuple(functions), tuple(weights), combination
        self.name = " + ".join(function.name for function in functions)
        self.note = " ".join(dict.fromkeys(function.note for function in functions if function.note))
        self.networks = [network for function in functions for network in function.networks]

    def __call__(self, images: Tensor) -> Assessment:
        assessments = [function(images) for function in self.functions]
        score = self._combined([found.score for found in assessments])
        measure = self._combined([found.level for found in assessments])
        gates = [found.gate for weight, found in zip(self.weights, assessments) if weight != 0]
        gate = torch.stack(gates).any(0) if gates else torch.zeros_like(assessments[0].gate)
        names = [function.name for function in self.functions]
        explanation = [
            {name: found.explanation[i] for name, found in zip(names, assessments)}
            for i in range(len(images))
        ]
        regions = [
            [region for found in assessments for region in found.regions_of(i)] for i in range(len(images))
        ]
        return Assessment(score, gate, explanation, regions, measure)

    def _combined(self, of_functions: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum or maximum of non-negative values, (B,) each."""
        values = torch.stack([w * value.clamp_min(0) for w, value in zip(self.weights, of_functions)])
        return values.sum(0) if self.combination == "sum" else values.amax(0)
