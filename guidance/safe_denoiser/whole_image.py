"""Safe Denoiser (Kim et al., "Training-Free Safe Denoisers for Safe Use of Diffusion Models", NeurIPS 2025).

The theorem: if the data are a mixture of safe and unsafe images, the posterior mean of the safe part is

    E_safe = E_data + beta* (E_data - E_unsafe),    beta* = pi / (1 - pi),    pi = P(unsafe | x_t)        (Eq. 4 and 5)

E_data is the model's denoised prediction. E_unsafe is the posterior mean over a negation set of reference latents z_n
under the forward kernel q(x_t | z_n) = N(signal z_n, noise^2 I), a softmax-weighted mean (Eq. 6).

beta* is a ratio of densities in thousands of dimensions: it is zero or infinite except near a reference. `exact` keeps it
as an honest likelihood ratio, `tempered` flattens it, and `calibrated`, the default, replaces it by a similarity whose
threshold is calibrated on the negation set itself. `official` is what the authors' code subtracts, without the noise that it
then adds anew. All of them return a correction of the denoised prediction and never draw random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.composition import capped, per_sample, sample_norm
from ..core.noise_level import NoiseLevel, SigmaWindow
from ..core.references import References
from .official import published_delta
from .similarity import Calibration, normalized_weights, similarities

Mode = Literal["calibrated", "exact", "tempered", "official"]
Anchor = Literal["prediction", "unconditional"]

OFFICIAL_WINDOW = SigmaWindow(low=4.67)
"""DDPM timesteps 780 to 1000 of Stable Diffusion 1.x, the window of the paper's text-to-image experiments."""

BETA_CAP = 9.0
"""beta = pi / (1 - pi) at pi = 0.9: more would rest on a likelihood ratio that the sampled references cannot support."""

NEGLIGIBLE_BETA = 1e-6
"""Below this a correction is lost in the rounding of single precision; taking it as zero leaves images bit-identical."""

GATE_RAMP = 0.25
"""The gate is fully open when the similarity exceeds its threshold by this share."""


@dataclass(frozen=True)
class SafeDenoiserSettings:
    """Settings of one Safe Denoiser correction.

    Args:
        mode: how the weight beta is found, see the module's description.
        strength: eta, the weight of the correction. 0 is the identity.
        window: noise levels at which the method acts.
        threshold: calibrated mode; the gate opens when a prediction's similarity exceeds this share of the references' own
            leave-one-out similarity, and is fully open 25 % above it. Of a thing's and a style's own log-odds when it is one of those.
        temperature: calibrated mode; similarities are compared at this scale. Smaller means the nearest references decide.
        cap: largest correction, as a share of the prediction's norm.
        effective_dimensions: tempered mode; the number of independent dimensions that the latent is taken to have.
        kappa: official mode; how fast the kernel falls with the root mean square distance, see `published_delta`.
        anchor: which prediction is compared and pushed away: the guider's own after CFG (the published code), or the
            unconditional one inside CFG (the paper's Eq. 8).
        keep_contrast: calibrated mode; compare at equal norm and keep the prediction's norm, so that only its content changes.
    """

    mode: Mode = "calibrated"
    strength: float = 0.33
    window: SigmaWindow = OFFICIAL_WINDOW
    threshold: float = 0.4
    temperature: float = 0.1
    cap: float = 0.5
    effective_dimensions: int = 256
    kappa: float = 6.45
    anchor: Anchor = "prediction"
    keep_contrast: bool = True


@dataclass(frozen=True)
class SafeDenoiserResult:
    """Outcome for a batch.

    `delta` (B, C, h, w) is to be added to the prediction for the samples whose `gate` (B,) is above zero; the others must
    be left untouched. `similarity` and `threshold` (B,) say why (calibrated mode; NaN otherwise).
    """

    delta: Tensor
    gate: Tensor
    similarity: Tensor
    threshold: Tensor


def kernel_logits(
    x: Tensor,
    references: References,
    level: NoiseLevel,
    anchor: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Log of q(x_t | z_n) up to a constant per sample: -||x_t - a z_n||^2 / (2 b^2), (B, N) in float32 or wider.

    With an `anchor` (the denoised prediction) the same term for it is subtracted: the log likelihood ratio of the reference
    against the prediction, free of the D/2 that the noise alone contributes. The un-divided form stays finite at a = 0.
    With a `mask` (1 or B, 1, h, w) all distances are taken inside it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    seen = torch.ones_like(x[:1, :1], dtype=wide) if mask is None else mask.to(wide)
    origin = torch.zeros_like(x, dtype=wide) if anchor is None else anchor.to(wide)
    residual = seen * (x.to(wide) - level.signal * origin)

    def excess(z: Tensor) -> Tensor:
        # ||x - a z||^2 - ||x - a o||^2 = a^2 ||z - o||^2 - 2 a <x - a o, z - o>, which does not cancel for near-duplicates.
        found = []
        for b in range(len(x)):
            away = (seen[b % len(seen)] * (z.to(wide) - origin[b])).flatten(1)
            found.append(
                level.signal**2 * away.square().sum(1) - 2 * level.signal * (away @ residual[b].flatten())
            )
        return torch.stack(found)

    return -references.collect(x.device, len(x), excess) / (2 * level.noise**2)


def likelihood_ratio_correction(
    x: Tensor,
    denoised: Tensor,
    references: References,
    level: NoiseLevel,
    settings: SafeDenoiserSettings,
    mask: Tensor | None = None,
) -> SafeDenoiserResult:
    """eta beta (E_data - E_unsafe) with beta = exp(min(log likelihood ratio, 0)), the `exact` and `tempered` modes (Eq. 7).

    `exact` is the honest likelihood ratio: numerically zero for everything but near-duplicates of a reference, which is what
    the theorem says about a finite set of images. `tempered` divides its logarithm by T = D / D_eff.
    """
    logits = kernel_logits(x, references, level, denoised, mask)
    if settings.mode == "tempered":
        logits = logits / max(1.0, denoised[0].numel() / settings.effective_dimensions)
    weights, log_ratio = normalized_weights(logits)
    beta = (settings.strength * log_ratio.clamp(max=0).exp()).clamp(max=BETA_CAP)
    beta = torch.where(beta < NEGLIGIBLE_BETA, 0.0, beta)
    nothing = torch.full_like(beta, math.nan)
    if not bool((beta > 0).any()):
        return SafeDenoiserResult(torch.zeros_like(denoised), beta, nothing, nothing)
    prediction = denoised.to(weights.dtype)
    difference = prediction - references.mean(weights)
    if mask is not None:
        difference = difference * mask
    delta = capped(per_sample(beta, difference) * difference, prediction, settings.cap)
    return SafeDenoiserResult(delta, beta, nothing, nothing)


def official_correction(
    denoised: Tensor, references: References, settings: SafeDenoiserSettings, mask: Tensor | None = None
) -> SafeDenoiserResult:
    """Subtract the published kernel mean of references of `normalize_channels`. Nothing gates it: it acts on every image."""
    delta = capped(
        published_delta(denoised, references, settings.kappa, settings.strength, mask), denoised, settings.cap
    )
    nothing = torch.full_like(denoised[:, 0, 0, 0], math.nan)
    return SafeDenoiserResult(delta, torch.ones_like(nothing), nothing, nothing)


def gate_of(score: Tensor, typical: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """How far the gate is open, in [0, 1], and the similarity from which it opens: (B,), (B,)."""
    threshold = (share * typical).clamp_min(1e-6).expand_as(score)
    return ((score - threshold) / (GATE_RAMP * threshold)).clamp(0, 1), threshold


def calibrated_correction(
    denoised: Tensor,
    references: References,
    calibration: Calibration,
    settings: SafeDenoiserSettings,
    mask: Tensor | None = None,
) -> SafeDenoiserResult:
    """Push the prediction away from the references that it resembles, once it resembles them enough.

    Args:
        denoised: (B, C, h, w) float32 prediction, usually after CFG.
        references: (N, C, h, w) in the same space.
        calibration: of `calibrate`, for the same mask.
        settings: strength, threshold, temperature and cap.
        mask: (1 or B, 1, h, w) in [0, 1], where to look and to act.
    """
    similarity = similarities(denoised, references, calibration.contrast, mask)
    weights, log_mean = normalized_weights(similarity / settings.temperature)
    score = settings.temperature * log_mean
    gate, threshold = gate_of(score, calibration.typical, settings.threshold)
    if not bool((gate > 0).any()):
        return SafeDenoiserResult(torch.zeros_like(denoised), gate, score, threshold)
    seen = torch.ones_like(denoised[:1, :1]) if mask is None else mask
    own, unsafe = seen * denoised, seen * references.mean(weights)
    if settings.keep_contrast:
        unsafe = unsafe * (sample_norm(own) / sample_norm(unsafe))
    delta = capped(settings.strength * per_sample(gate, denoised) * (own - unsafe), denoised, settings.cap)
    if settings.keep_contrast:
        # Moving away also adds contrast; scale (own + delta) back to own's norm and express that as part of the change.
        back = sample_norm(own) / sample_norm(own + delta)
        delta = back * delta + (back - 1) * own
    return SafeDenoiserResult(delta, gate, score, threshold)
