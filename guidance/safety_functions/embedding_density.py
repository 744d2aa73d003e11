"""Two-class posterior over image embeddings, estimated from unwanted and neutral images.

Both classes get a kernel density of unit embeddings with a von Mises-Fisher kernel, the Gaussian of the
sphere (Mardia and Jupp, "Directional Statistics", 2000). Their log-odds are the logit of the posterior
P(unwanted) with which Safe Denoiser weighs references (Kim et al., NeurIPS 2025, Eq. 6), in a space where
distance follows what an image shows. The kernel's width and the threshold come from leave-one-out, so they
need no images beyond the negation set's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 4
"""Fewest images of a class. With fewer, leaving one out leaves nearly nothing."""

CONCENTRATIONS = tuple(2.0**k for k in range(11))
"""Concentrations of the kernel that are tried, from a hemisphere (1) to near-copies only (1024)."""

ONE_CLASS_SHARE = 0.9
"""Share of the set's own images that the gate finds if there are no neutral images to compare with."""


@dataclass(frozen=True)
class LeaveOneOut:
    """Counts of the set's own images, each judged by the density of the others.

    Attributes:
        found, unwanted: unwanted images above the threshold, and all of them.
        false_alarms, neutral: neutral images above the threshold, and all of them.
    """

    found: int
    unwanted: int
    false_alarms: int
    neutral: int


@dataclass(frozen=True)
class EmbeddingDensity:
    """Log-odds of an embedding between unwanted and neutral images, with a calibrated threshold.

    Attributes:
        unwanted: (N, D) unit embeddings, float32.
        neutral: (M, D) unit embeddings; None to compare with the density of the unwanted ones alone.
        concentration: of the kernel, kappa: the inverse of its variance.
        threshold: log-odds above which an image counts as unwanted.
        check: the set's own images judged by leave-one-out with this threshold.
    """

    unwanted: Tensor
    neutral: Tensor | None
    concentration: float
    threshold: float
    check: LeaveOneOut

    def log_odds(self, embeddings: Tensor) -> Tensor:
        """Return log p(e | unwanted) - log p(e | neutral) of unit embeddings: (B, D) -> (B,), float32.

        The normalisation of the kernel is the same in both and cancels. Without neutral images it is
        log p(e | unwanted) up to that constant.
        """
        embeddings = embeddings.float()
        unwanted = log_density(embeddings, self.unwanted.to(embeddings), self.concentration)
        if self.neutral is None:
            return unwanted
        return unwanted - log_density(embeddings, self.neutral.to(embeddings), self.concentration)


def log_density(embeddings: Tensor, references: Tensor, concentration: float) -> Tensor:
    """Return the log of the mean kernel exp(kappa (cos - 1)) over the references: (B, D), (N, D) -> (B,)."""
    exponents = concentration * (embeddings @ references.T - 1)  # (B, N)
    return torch.logsumexp(exponents, 1) - math.log(len(references))


def leave_one_out_density(references: Tensor, concentration: float) -> Tensor:
    """Return the log density of every reference under all the others: (N, D) -> (N,)."""
    exponents = concentration * (references @ references.T - 1)  # (N, N)
    exponents.fill_diagonal_(-math.inf)
    return torch.logsumexp(exponents, 1) - math.log(len(references) - 1)


def calibrate(unwanted: Tensor, neutral: Tensor | None, false_alarms: float) -> EmbeddingDensity:
    """Choose the kernel's concentration and the threshold by leave-one-out.

    With neutral images, the concentration is the smallest whose cross-entropy is within one standard error
    of the best, and the threshold the conformal quantile of the neutral images' log-odds (Vovk, Gammerman
    and Shafer, "Algorithmic Learning in a Random World", 2005). Without them the concentration maximises the
    likelihood of the images themselves, and ONE_CLASS_SHARE of them lie above the threshold.

    Args:
        unwanted: (N, D) unit embeddings, at least FEWEST.
        neutral: (M, D) unit embeddings, at least FEWEST, or None.
        false_alarms: wanted share of neutral images above the threshold, in [0, 1]. With less than one
            expected image the threshold is their largest log-odds. It is never below 0.

    Raises:
        ValueError: there are too few images of a class, or the embeddings are not finite.
    """
    _check(unwanted, "unwanted")
    if neutral is None:
        concentration = max(CONCENTRATIONS, key=lambda kappa: _likelihood(unwanted, kappa))
        own = leave_one_out_density(unwanted, concentration)
        threshold = _order_statistic(own, math.ceil((1 - ONE_CLASS_SHARE) * len(own)))
        found = int((own > threshold).sum())
        return EmbeddingDensity(
            unwanted, None, concentration, threshold, LeaveOneOut(found, len(unwanted), 0, 0)
        )
    _check(neutral, "neutral")
    concentration = _smoothest_concentration(unwanted, neutral)
    of_unwanted, of_neutral = _leave_one_out_odds(unwanted, neutral, concentration)
    rank = min(len(of_neutral), math.ceil((1 - false_alarms) * (len(of_neutral) + 1)))
    # Below log-odds of 0 an image is more like the neutral ones, however far apart the classes are.
    threshold = max(0.0, _order_statistic(of_neutral, max(1, rank)))
    check = LeaveOneOut(
        int((of_unwanted > threshold).sum()),
        len(of_unwanted),
        int((of_neutral > threshold).sum()),
        len(of_neutral),
    )
    return EmbeddingDensity(unwanted, neutral, concentration, threshold, check)


def _check(embeddings: Tensor, kind: str) -> None:
    if len(embeddings) < FEWEST:
        raise ValueError(
            f"The negation set has {len(embeddings)} {kind} images, and {FEWEST} are needed. Add images."
        )
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError(
            "The image encoder gives values that are not numbers. Load it in float32, or choose another."
        )


def _leave_one_out_odds(unwanted: Tensor, neutral: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """Return the log-odds of every image without its own kernel: (N,) of unwanted, (M,) of neutral ones."""
    of_unwanted = leave_one_out_density(unwanted, concentration) - log_density(
        unwanted, neutral, concentration
    )
    of_neutral = log_density(neutral, unwanted, concentration) - leave_one_out_density(neutral, concentration)
    return of_unwanted, of_neutral


def _smoothest_concentration(unwanted: Tensor, neutral: Tensor) -> float:
    """Return the smallest concentration whose loss is within one standard error of the smallest loss."""
    losses = []
    for concentration in CONCENTRATIONS:
        of_unwanted, of_neutral = _leave_one_out_odds(unwanted, neutral, concentration)
        losses.append((F.softplus(-of_unwanted), F.softplus(of_neutral)))  # cross-entropy of every image
    means = [float(u.mean() + n.mean()) for u, n in losses]
    best = min(range(len(means)), key=means.__getitem__)
    u, n = losses[best]
    error = math.sqrt(float(u.var() / len(u) + n.var() / len(n)))
    return next(kappa for kappa, mean in zip(CONCENTRATIONS, means) if mean <= means[best] + error)


def _likelihood(references: Tensor, concentration: float) -> float:
    """Return the mean leave-one-out log-likelihood of the references, with the kernel's normalisation."""
    width = references.shape[1]
    own = float(leave_one_out_density(references, concentration).mean())
    return own + log_normalisation(concentration, width) + concentration


def log_normalisation(concentration: float, width: int) -> float:
    """Return the log constant of the von Mises-Fisher density exp(kappa cos) in `width` dimensions.

    The Bessel function in it is taken from its uniform expansion for large orders (Abramowitz and Stegun,
    9.7.7), whose relative error is about 1 / (6 width).
    """
    order = width / 2 - 1
    root = math.hypot(order, concentration)
    log_bessel = root + order * math.log(concentration / (order + root)) - 0.5 * math.log(2 * math.pi * root)
    return order * math.log(concentration) - width / 2 * math.log(2 * math.pi) - log_bessel


def _order_statistic(values: Tensor, rank: int) -> float:
    """Return the `rank`-th smallest value, counted from 1."""
    return float(values.sort().values[rank - 1])
