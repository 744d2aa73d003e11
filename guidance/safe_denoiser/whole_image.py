"""Calibrated mode for whole images: beta is replaced by a gate on the similarity with the set.

The gate's threshold is a share of S_ref, the similarity that the set's own images have with each other. So
the same threshold suits every set, model and image size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.composition import capped, per_sample, sample_norm
from ..core.references import References
from .interface import MoveReferences, Predictions, ReferenceComparison
from .settings import SafeDenoiserResult, SafeDenoiserSettings
from .similarity import ReferenceStatistics, normalized_weights, reference_statistics, similarities

GATE_RAMP = 0.25
"""The gate is fully open when the similarity exceeds its threshold by this share."""


def similarity_gate(score: Tensor, typical: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return how far the gate is open, (B,) in [0, 1], and the similarity (B,) from which it opens."""
    threshold = (share * typical).clamp_min(1e-6).expand_as(score)
    return ((score - threshold) / (GATE_RAMP * threshold)).clamp(0, 1), threshold


def calibrated_correction(
    denoised: Tensor,
    references: References,
    statistics: ReferenceStatistics,
    settings: SafeDenoiserSettings,
    mask: Tensor | None = None,
) -> SafeDenoiserResult:
    """Push the prediction away from the references that it resembles, once it resembles them enough.

    Prediction and references are compared at equal norm, and the prediction keeps its norm, so that only its
    content changes.

    Args:
        denoised: (B, C, h, w) float32 prediction, usually after CFG.
        references: (N, C, h, w) in the same space.
        statistics: of `reference_statistics`, for the same mask.
        settings: strength, threshold, temperature and cap.
        mask: (1 or B, 1, h, w) in [0, 1], where to compare and to act.
    """
    similarity = similarities(denoised, references, statistics.contrast, mask)
    weights, log_mean = normalized_weights(similarity / settings.temperature)
    score = settings.temperature * log_mean
    gate, threshold = similarity_gate(score, statistics.typical, settings.threshold)
    if not bool((gate > 0).any()):
        return SafeDenoiserResult(torch.zeros_like(denoised), gate, score, threshold)
    seen = torch.ones_like(denoised[:1, :1]) if mask is None else mask
    own = seen * denoised
    unsafe = seen * references.mean(weights)
    unsafe = unsafe * (sample_norm(own) / sample_norm(unsafe))
    delta = capped(settings.strength * per_sample(gate, denoised) * (own - unsafe), denoised, settings.cap)
    # Moving away also adds contrast; scale (own + delta) back to own's norm and express that as part of the
    # change.
    back = sample_norm(own) / sample_norm(own + delta)
    return SafeDenoiserResult(back * delta + (back - 1) * own, gate, score, threshold)


class WholeImageComparison(ReferenceComparison):
    """Comparison by the similarity with whole reference images.

    Its statistics without a mask serve further runs.
    """

    def __init__(self, references: References, settings: SafeDenoiserSettings) -> None:
        super().__init__(references, settings)
        self._unmasked: ReferenceStatistics | None = None
        self._statistics: ReferenceStatistics | None = None

    def place(self, device: torch.device, move: MoveReferences, mask: Tensor | None) -> None:
        super().place(device, move, mask)
        if mask is not None:
            self._statistics = self._measure(device, mask)
            return
        if self._unmasked is None:
            self._unmasked = self._measure(device, None)
        self._statistics = self._unmasked

    def correct(self, predictions: Predictions) -> SafeDenoiserResult:
        assert self._statistics is not None, "place was not called"
        denoised = predictions.anchored(self.settings.anchor)
        return calibrated_correction(
            denoised, self.references, self._statistics, self.settings, predictions.mask
        )

    def _measure(self, device: torch.device, mask: Tensor | None) -> ReferenceStatistics:
        return reference_statistics(self.references, self.settings.temperature, device, mask)
