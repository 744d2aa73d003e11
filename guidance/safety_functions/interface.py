"""Safety functions: how unsafe an image looks to a detector, as a number that can be differentiated.

The papers write g = -U for what is increased; here U, the unsafe score, is what guidance decreases.
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
    """Where something unsafe was found: corners (left, top, right, bottom) as shares of the image's width and height."""

    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Assessment:
    """What a safety function says about a batch of images.

    Attributes:
        score: (B,) float32, larger is less safe; gradients flow through it to the images.
        gate: (B,) bool, whether the image is unsafe enough to act on.
        explanation: for every image, names and figures for people, fit for JSON.
        regions: for every image, what was found where; empty for functions that look at the whole.
    """

    score: Tensor
    gate: Tensor
    explanation: list[dict[str, Any]]
    regions: list[list[Region]] = field(default_factory=list)

    def regions_of(self, index: int) -> list[Region]:
        """Regions of one image."""
        return self.regions[index] if self.regions else []


def in_words(found: Assessment) -> str:
    """A line for each image: the verdict, the score, and the regions found."""
    lines = []
    for index, (score, gate) in enumerate(zip(found.score.tolist(), found.gate.tolist())):
        regions = "; ".join(f"{region.label} {region.score:.2f}" for region in found.regions_of(index))
        lines.append(
            f"image {index + 1}: {'unsafe' if gate else 'safe'}, score {score:.3g}"
            + (f" ({regions})" if regions else "")
        )
    return "\n".join(lines)


class SafetyFunction(ABC):
    """Scores images. Must be differentiable, treat every image of a batch by itself, and draw no random numbers."""

    name: str
    networks: Sequence[nn.Module] = ()
    """Everything with weights, for the host to load and to differentiate."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Assessment:
        """Assess images (B, 3, H, W) of any size, nominally in [0, 1]; decoders may exceed that range."""


Combination = Literal["sum", "maximum"]


class CombinedSafetyFunction(SafetyFunction):
    """Several safety functions as one: their weighted scores are added up, or the largest counts; any open gate opens."""

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
        self.networks = [network for function in functions for network in function.networks]

    def __call__(self, images: Tensor) -> Assessment:
        parts = [function(images) for function in self.functions]
        scores = torch.stack([weight * part.score for weight, part in zip(self.weights, parts)])
        score = scores.sum(0) if self.combination == "sum" else scores.amax(0)
        # A function without weight has no say.
        gates = [part.gate for weight, part in zip(self.weights, parts) if weight != 0]
        gate = torch.stack(gates).any(0) if gates else torch.zeros_like(parts[0].gate)
        explanation = [
            {function.name: part.explanation[i] for function, part in zip(self.functions, parts)}
            for i in range(len(images))
        ]
        regions = [[region for part in parts for region in part.regions_of(i)] for i in range(len(images))]
        return Assessment(score, gate, explanation, regions)
