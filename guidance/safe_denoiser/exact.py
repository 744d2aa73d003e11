"""Exact mode: the likelihood ratio of a reference against the prediction, with the paper's kernel.

It is about 1 / N for a copy of one of N references, and numerically zero for everything else. It is not beta*
of the theorem, which needs the density of the safe part and exceeds 1 where the unsafe part is more likely.
"""

from __future__ import annotations

from .interface import Predictions, ReferenceComparison
from .likelihood_ratio import likelihood_ratio_correction
from .settings import SafeDenoiserResult


class ExactComparison(ReferenceComparison):
    """Comparison by the likelihood ratio of a reference against the prediction."""

    def correct(self, predictions: Predictions) -> SafeDenoiserResult:
        denoised = predictions.anchored(self.settings.anchor)
        return likelihood_ratio_correction(
            predictions.x, denoised, self.references, predictions.level, self.settings, mask=predictions.mask
        )
