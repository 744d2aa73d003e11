"""Evaluation of guideline tokens on images with masks: calibration of their maps, overlap with the masks."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_cache import MapSource
from .attention_maps import normalize_jointly
from .guideline_tokens import MapCalibration

FALSE_ALARMS = 0.05
"""Share of the images without the concept that may exceed the calibrated threshold at some noise level."""


@torch.no_grad()
def detections(cache: MapSource, embeddings: Tensor) -> Tensor:
    """Return the concept tokens' mean probability at all noise levels, not calibrated: (levels, N, h, w)."""
    return torch.stack([cache.probabilities(embeddings, level).mean(1) for level in range(len(cache.sigmas))])


def calibrate_maps(maps: Tensor, masks: Tensor) -> MapCalibration:
    """Measure the threshold and the background of maps.

    All but a few images without the concept stay below the threshold at every noise level. When the maxima of
    the two kinds of images do not overlap, the threshold is the middle between them. Without images of both
    kinds it is the papers' 1/2.

    Args:
        maps: (levels, N, h, w) from `detections`, preferably of images that the tokens have not learnt from.
        masks: (N, h, w) bool.
    """
    shows = masks.flatten(1).any(1)  # (N,)
    threshold = 0.5
    if bool(shows.any()) and not bool(shows.all()):
        highest = maps.flatten(2).amax(2).amax(0)  # (N,)
        with_concept = highest[shows]
        without = highest[~shows]
        apart = bool(with_concept.min() > without.max())
        between = (with_concept.min() + without.max()) / 2
        threshold = float((between if apart else without.quantile(1 - FALSE_ALARMS)).clamp(0.01, 0.99))
    calibrated = normalize_jointly(MapCalibration(threshold).apply(maps))
    elsewhere = calibrated[:, ~masks].flatten()
    background = float(elsewhere.quantile(0.95)) if 0 < elsewhere.numel() < 2**24 else 0.0
    return MapCalibration(threshold, min(1.0, max(0.0, background)))


def overlap(maps: Tensor, masks: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the intersection over union of maps at a threshold with masks.

    Args:
        maps: (..., N, h, w).
        masks: (N, h, w) bool.
        threshold: value from which a position of a map counts as found.

    Returns:
        (..., N), NaN where nothing is found and the mask is empty.
    """
    found = maps >= threshold
    intersection = (found & masks).flatten(-2).sum(-1)
    union = (found | masks).flatten(-2).sum(-1)
    return intersection / union
