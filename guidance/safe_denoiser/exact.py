"""Exact mode: the paper's likelihood ratio.

It is about 1 / N for a copy of one of N references, and numerically zero for everything else. This is what
the theorem says about a finite set of images.
"""

from __future__ import annotations

from .interface import Predictions, ReferenceComparison
from .likelihood_ratio import likelihood_ratio_correction
from .settings import SafeDenoiserResult


class ExactComparison(ReferenceComparison):
    """Comparison by the paper's likelihood ratio as published."""

    def correct(self, predictions: Predictions) -> SafeDenoiserResult:
        denoised = predictions.anchored(self.settings.anchor)
        return likelihood_ratio_correction(
            predictions.x, denoised, self.references, predictions.level, self.settings, mask=predictions.mask
        )
