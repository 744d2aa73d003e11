"""Self-regulation: where and how strongly to guide, from the size and the certainty of a detection.

Li et al., Detect-and-Guide (CVPR 2025), section 3.2. The MagnitudeScaler is clamp(., 1, 5) as the text says;
Eq. 5 prints the maximum instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.composition import per_sample
from .objects import fill_blurred, fill_nearest, object_shares, within_reach
from .settings import DetectAndGuideSettings

EDIT_THRESHOLD = 0.01
"""The paper's tau_lo."""


@dataclass(frozen=True)
class Detection:
    """Result of evaluating the detection maps of a batch.

    Attributes:
        scale: (B, 1, h, w), S of the paper times the edit mask; zero for samples without a detection.
        edit: (B, 1, h, w) bool, positions that may be changed.
        detected: (B,) bool, samples with a position above tau_hi.
        ambiguous: (B,) bool, samples covered so much that no object is distinct yet.
    """

    scale: Tensor
    edit: Tensor
    detected: Tensor
    ambiguous: Tensor

    @property
    def rows(self) -> Tensor:
        """Return (B,) bool, the samples to guide."""
        return self.detected & ~self.ambiguous


def lowest_edited(settings: DetectAndGuideSettings, background: float) -> float:
    """Return the detection from which a position may be changed.

    It is the setting or, if that is 0, the larger of the paper's value and the tokens' background noise.
    """
    return settings.edit_threshold or max(EDIT_THRESHOLD, background)


def area_scale(edit: Tensor, unsafe: Tensor, settings: DetectAndGuideSettings) -> Tensor:
    """Return the AreaScaler: every object gets `base` times the share of the image that it covers.

    The positions of the edit mask around an object get the object's value too.

    Args:
        edit: (B, h, w) bool, the positions that may be changed.
        unsafe: (B, h, w) bool, the detected positions.
        settings: the method's constants.

    Returns:
        (B, h, w) float32; zero for samples in which nothing is detected.
    """
    objects = settings.base * object_shares(unsafe, settings.connectivity)
    filled = fill_nearest(objects, unsafe) if settings.fill == "nearest" else fill_blurred(objects, unsafe)
    return torch.maximum(objects, filled * edit)


def magnitude_scale(detection: Tensor, edit_threshold: float, largest: float = 5.0) -> Tensor:
    """Return the MagnitudeScaler: the detection in units of the edit threshold, clamped to [1, `largest`].

    It is 0 where the detection is below the threshold. The paper's Eq. 5, with the clamp of its text.
    """
    certainty = (detection / edit_threshold).clamp(1, max(1.0, largest))
    return torch.where(detection >= edit_threshold, certainty, torch.zeros_like(detection))


def regulate(
    detection: Tensor, settings: DetectAndGuideSettings, background: float = 0.0, held: Tensor | None = None
) -> Detection:
    """Decide where and how strongly to guide.

    Args:
        detection: (B, 1, h, w) detection maps in [0, 1].
        settings: the method's constants.
        background: values of the maps where the concept is not, as `MapCalibration.background`.
        held: (B,) bool, samples in which the concept was detected before.
    """
    edit_threshold = lowest_edited(settings, background)
    maps = detection[:, 0]
    edit = maps >= edit_threshold
    ambiguous = edit.flatten(1).float().mean(1) >= settings.coverage
    threshold = torch.full((len(maps), 1, 1), settings.detection_threshold, device=maps.device)
    if held is not None:
        threshold[held] = min(settings.hold_threshold, settings.detection_threshold)
    unsafe = maps >= threshold
    detected = unsafe.flatten(1).any(1)
    if settings.core > 0:
        unsafe |= (maps >= settings.core * maps.amax((1, 2), keepdim=True)) & detected[:, None, None]
    if settings.reach > 0:
        edit = edit & within_reach(unsafe, settings.reach)
    magnitude = magnitude_scale(maps, edit_threshold, settings.magnitude)
    scale = area_scale(edit, unsafe, settings).to(maps.dtype) * magnitude
    scale = (settings.strength * scale).clamp(max=settings.cap) * edit
    scale = torch.where(per_sample(detected & ~ambiguous, scale), scale, torch.zeros_like(scale))
    return Detection(scale[:, None], edit[:, None], detected, ambiguous)
