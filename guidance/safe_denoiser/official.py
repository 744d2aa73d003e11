"""Official mode: the change that the published code of Safe Denoiser makes, for comparison.

The code differs from the paper. The kernel's distance is not squared. Its bandwidth is a constant instead of
the noise level. The query is the prediction after CFG. References are normalised per latent pixel, and the
query is not. The reference mean is subtracted instead of weighted by beta. The code also adds new noise to
the result before a step with the old noise prediction, so that two independent noises add up; this mode does
not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.composition import capped
from ..core.references import References, unit_pixels
from .interface import Predictions, ReferenceComparison
from .settings import SafeDenoiserResult, SafeDenoiserSettings

EPSILON = 1e-8
"""Added to the kernel sum by the published code. It dominates the sum whenever no reference is near."""


def published_delta(
    denoised: Tensor, references: References, kappa: float, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Return the published change of the prediction, -scale * E_unsafe, streamed over the references.

    E_unsafe is the mean of the references, weighted by k_n / (sum_m k_m + EPSILON) with the kernel k_n =
    exp(-kappa r_n) and the root mean square distance r_n = ||x0 - z_n|| / sqrt(D). In the code's terms kappa
    = sqrt(D) / (2 bandwidth^2): 6.45 for the published nudity setting of Stable Diffusion 1.4, 0.37 for its
    style and memorisation settings, 16.9 for SD3's.

    Args:
        denoised: (B, C, h, w) prediction.
        references: (N, C, h, w) of `unit_pixels`.
        kappa: how fast the kernel falls with the distance.
        scale: weight of the mean.
        mask: (1 or B, 1, h, w) in [0, 1], where distances and changes are taken.
    """
    seen = torch.ones_like(denoised[:1, :1]) if mask is None else mask.to(denoised.dtype)
    root = seen.sqrt().expand(len(denoised), -1, -1, -1)
    size = denoised[0].numel()

    def distances(z: Tensor) -> Tensor:
        return torch.stack([(r * (x - z)).flatten(1).norm(dim=1) for r, x in zip(root, denoised)])  # (B, n)

    logits = -kappa * references.collect(denoised.device, len(denoised), distances) / math.sqrt(size)
    # exp(logits) / (sum + EPSILON) without underflow; the weights sum to less than 1 when no reference is
    # near.
    total = torch.logaddexp(torch.logsumexp(logits, 1), logits.new_tensor(math.log(EPSILON)))
    return -scale * seen * references.mean((logits - total[:, None]).exp())


class OfficialComparison(ReferenceComparison):
    """Comparison by the published kernel mean. It has no gate: it changes every image."""

    def __init__(self, references: References, settings: SafeDenoiserSettings) -> None:
        super().__init__(references.then(unit_pixels), settings)

    def correct(self, predictions: Predictions) -> SafeDenoiserResult:
        denoised = predictions.anchored(self.settings.anchor)
        delta = published_delta(
            denoised, self.references, self.settings.kappa, self.settings.strength, predictions.mask
        )
        gate = torch.ones_like(denoised[:, 0, 0, 0])
        return SafeDenoiserResult.without_threshold(capped(delta, denoised, self.settings.cap), gate)
