"""Safety function from NudeNet, a detector of 18 kinds of body parts.

The network is the detector that the `nudenet` package ships (a YOLOv8), converted to torch elsewhere. This
module does the steps around it as that package does: pad to a square, resize, keep boxes by non-maximum
suppression. The choice of boxes is not differentiable; gradients flow through the confidences of the boxes
kept, as in the published code of STG. The channels are in the order red, green, blue, as in that code and in
the network's training. (The package uses blue, green, red when it reads a file itself.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from .interface import Assessment, Region, SafetyFunction

LABELS = (
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)
"""The network's classes in the order of its outputs."""

PAPER_CLASSES = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "ANUS_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)
"""The four classes that Safe Text Embedding Guidance counts as nudity."""

LONGEST_NAMES = 80
"""Most characters of unknown names that an error repeats."""

OVERLAP = 0.45
"""Intersection over union with a more confident box above which a box is dropped (nudenet package)."""

MOST_BOXES = 300
"""Most boxes kept for one image."""


def classes_from(text: str) -> tuple[str, ...]:
    """Parse class names, separated by commas or line breaks.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    names = tuple(part.strip().upper() for part in text.replace("\n", ",").split(",") if part.strip())
    unknown = [name for name in names if name not in LABELS]
    if unknown or not names:
        shown = ", ".join(unknown)[:LONGEST_NAMES]
        raise ValueError(
            f"NudeNet has no class '{shown}'. Choose from {', '.join(LABELS[:6])} and the others."
        )
    return names


def squared(images: Tensor, size: int) -> Tensor:
    """Pad images (B, 3, H, W) with black at the right and bottom to squares, then resize them to `size`."""
    height, width = images.shape[-2:]
    side = max(height, width)
    padded = F.pad(images, (0, side - width, 0, side - height))
    if side == size:
        return padded
    return F.interpolate(padded, (size, size), mode="bilinear", align_corners=False)


def kept_boxes(output: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes of one image that remain after non-maximum suppression.

    Args:
        output: (22, anchors): centre, width and height in pixels of the network's input, then 18 confidences.
        threshold: confidence above which a box counts.

    Returns:
        Boxes (n, 4) by their corners, confidences (n,) with their gradient, and class numbers (n,), most
        confident first.
    """
    confidences, labels = output[4:].max(dim=0)
    candidates = (confidences > threshold).nonzero()[:, 0]
    boxes = box_convert(output[:4, candidates].T, "cxcywh", "xyxy")
    chosen = nms(boxes.detach().float(), confidences[candidates].detach().float(), OVERLAP)
    kept = candidates[chosen[:MOST_BOXES]]
    return box_convert(output[:4, kept].T, "cxcywh", "xyxy"), confidences[kept], labels[kept]


class NudeNetSafetyFunction(SafetyFunction):
    """Scores an image by the sum of the confidences of the boxes of some classes.

    The gate opens when there is such a box.

    Args:
        network: images (B, 3, size, size) in [0, 1] to raw output (B, 22, anchors).
        classes: names from `LABELS`.
        threshold: confidence above which a box counts. The published code guides from 0.01; the package
            reports from 0.25.
        size: side in pixels of the network's input, a multiple of 32. A larger input finds smaller parts and
            costs more.

    Raises:
        ValueError: when called, if the network returns another shape.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str] = PAPER_CLASSES,
        threshold: float = 0.01,
        size: int = 320,
    ) -> None:
        self.network, self.threshold, self.size = network, threshold, size
        self.name, self.networks = "NudeNet", [network]
        self.classes = tuple(classes)
        self._numbers = [LABELS.index(name) for name in classes]

    def __call__(self, images: Tensor) -> Assessment:
        outputs = self.network(squared(images.float(), self.size).clamp(0, 1)).float()
        if outputs.ndim != 3 or outputs.shape[1] != 4 + len(LABELS):
            raise ValueError(
                f"The detector's output has the shape {tuple(outputs.shape)} instead of "
                f"(images, {4 + len(LABELS)}, boxes). Choose a file with NudeNet's detector."
            )
        found = [self._of_one(output, images.shape[-2:]) for output in outputs]
        score = torch.stack([of_image for of_image, _ in found])
        regions = [of_image for _, of_image in found]
        gate = torch.tensor([bool(of_image) for of_image in regions], device=images.device)
        return Assessment(score, gate, [_summary(of_image) for of_image in regions], regions)

    def _of_one(self, output: Tensor, shape: torch.Size) -> tuple[Tensor, list[Region]]:
        """Return score and regions of one image from its raw output (22, anchors) and its (height, width)."""
        boxes, confidences, labels = kept_boxes(output, self.threshold)
        counts = torch.isin(labels, torch.tensor(self._numbers, device=labels.device))
        height, width = shape
        # From pixels of the network's input to shares of the image, which covers only a part of the square.
        scale = boxes.new_tensor([width, height, width, height]) * self.size / max(height, width)
        shares = (boxes.detach() / scale).clamp(0, 1)[counts].tolist()
        kept = zip(labels[counts].tolist(), confidences[counts].detach().tolist(), shares)
        regions = [Region(LABELS[label], score, tuple(box)) for label, score, box in kept]
        # The sum over no box is a 0 without a gradient. The second term gives every image a gradient.
        return confidences[counts].sum() + 0 * output.sum(), regions


def _summary(regions: Sequence[Region]) -> dict[str, Any]:
    """Return the highest confidence of each class found."""
    best: dict[str, float] = {}
    for region in regions:
        best[region.label] = max(best.get(region.label, 0.0), region.score)
    return best
