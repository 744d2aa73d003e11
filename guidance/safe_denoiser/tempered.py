"""Tempered mode: the logarithm of the likelihood ratio divided by T = D / D_eff.

A latent has far fewer independent dimensions D_eff than numbers D. The division by T makes the kernel as wide
as if it had been computed from D_eff numbers, so that the ratio also differs from zero further away from a
reference.
"""

from __future__ import annotations

from .interface import Predictions, ReferenceComparison
from .likelihood_ratio import likelihood_ratio_correction
from .settings import SafeDenoiserResult


class TemperedComparison(ReferenceComparison):
    """Comparison by the likelihood ratio with a wider kernel, so that it also responds to similar images."""

    def correct(self, predictions: Predictions) -> SafeDenoiserResult:
        denoised = predictions.anchored(self.settings.anchor)
        divisor = max(1.0, denoised[0].numel() / self.settings.effective_dimensions)
        return likelihood_ratio_correction(
            predictions.x,
            denoised,
            self.references,
            predictions.level,
            self.settings,
            divisor,
            predictions.mask,
        )
