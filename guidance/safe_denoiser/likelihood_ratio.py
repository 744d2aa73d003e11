"""The likelihood ratio of a reference against the prediction (Eq. 6 and 7), for exact and tempered mode."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.composition import capped, per_sample
from ..core.noise_level import NoiseLevel
from ..core.references import References
from .settings import SafeDenoiserResult, SafeDenoiserSettings
from .similarity import normalized_weights

BETA_CAP = 9.0
"""beta = pi / (1 - pi) at pi = 0.9. A larger beta would rest on a likelihood ratio that the sampled
references cannot support."""

NEGLIGIBLE_BETA = 1e-6
"""A correction with a smaller beta is lost in the rounding of single precision. Taken as zero, it leaves
images bit-identical."""


def kernel_logits(
    x: Tensor,
    references: References,
    level: NoiseLevel,
    anchor: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return log q(x_t | z_n) = -||x_t - a z_n||^2 / (2 b^2), up to a constant per sample: (B, N).

    With an `anchor` (the denoised prediction), the same term of the anchor is subtracted. This gives the log
    likelihood ratio of the reference against the prediction, free of the D/2 that the noise alone
    contributes. The undivided form stays finite at a = 0. With a `mask` (1 or B, 1, h, w), all distances are
    taken inside it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    seen = torch.ones_like(x[:1, :1], dtype=wide) if mask is None else mask.to(wide)
    origin = torch.zeros_like(x, dtype=wide) if anchor is None else anchor.to(wide)
    residual = seen * (x.to(wide) - level.signal * origin)

    def excess(z: Tensor) -> Tensor:
        # ||x - a z||^2 - ||x - a o||^2 = a^2 ||z - o||^2 - 2 a <x - a o, z - o>, which does not cancel for
        # near-duplicates.
        found = []
        for b in range(len(x)):
            away = (seen[b % len(seen)] * (z.to(wide) - origin[b])).flatten(1)  # (n, C h w)
            square = away.square().sum(1)
            product = away @ residual[b].flatten()
            found.append(level.signal**2 * square - 2 * level.signal * product)
        return torch.stack(found)  # (B, n)

    return -references.collect(x.device, len(x), excess) / (2 * level.noise**2)


def likelihood_ratio_correction(
    x: Tensor,
    denoised: Tensor,
    references: References,
    level: NoiseLevel,
    settings: SafeDenoiserSettings,
    divisor: float = 1.0,
    mask: Tensor | None = None,
) -> SafeDenoiserResult:
    """Return eta beta (E_data - E_unsafe) with beta = exp(min(log likelihood ratio / divisor, 0)) (Eq. 7).

    Args:
        x: (B, C, h, w) noisy latent.
        denoised: (B, C, h, w) prediction that is compared and pushed away.
        references: (N, C, h, w) in the same space.
        level: the noise level of x.
        settings: strength and cap.
        divisor: of the logarithm of the likelihood ratio; 1 is the paper's formula.
        mask: (1 or B, 1, h, w) in [0, 1], where to compare and to act.
    """
    logits = kernel_logits(x, references, level, denoised, mask) / divisor
    weights, log_ratio = normalized_weights(logits)
    beta = (settings.strength * log_ratio.clamp(max=0).exp()).clamp(max=BETA_CAP)
    beta = torch.where(beta < NEGLIGIBLE_BETA, 0.0, beta)
    if not bool((beta > 0).any()):
        return SafeDenoiserResult.without_threshold(torch.zeros_like(denoised), beta)
    prediction = denoised.to(weights.dtype)
    difference = prediction - references.mean(weights)
    if mask is not None:
        difference = difference * mask
    delta = capped(per_sample(beta, difference) * difference, prediction, settings.cap)
    return SafeDenoiserResult.without_threshold(delta, beta)
