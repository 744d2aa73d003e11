"""Statistics of a negation set: similarity of its images, near-duplicates, calibration of the gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.layouts import fit
from ..formats.negation_set import NegationSet
from ..formats.pixel_values import to_floats
from ..guidance.core.references import References, evenly_spread
from ..guidance.safe_denoiser.similarity import (
    STATISTICS_SAMPLE,
    leave_one_out,
    reference_contrasts,
    similarities,
)

THUMBNAIL = 32
"""Side of the images that are compared without a VAE: that of the latent of an image of 256 pixels."""

CLOSEST_PAIRS = 3
"""Number of most similar pairs that a report names."""
NEAR_DUPLICATE = 0.95
"""Two images with at least this similarity differ only in details."""


@dataclass(frozen=True)
class SetStatistics:
    """Statistics of a set's images, or of STATISTICS_SAMPLE images spread over the set.

    Attributes:
        compared: how many images were compared.
        mean_similarity: mean over pairs of different images; NaN for a single image.
        typical: S_ref; the threshold of the calibrated mode is a share of it.
        closest: the most similar pairs, best first, as (similarity, place, place).
        near_duplicates: number of pairs with a similarity above NEAR_DUPLICATE.
    """

    compared: int
    mean_similarity: float
    typical: float
    closest: list[tuple[float, int, int]]
    near_duplicates: int


def thumbnails(negation_set: NegationSet) -> References:
    """Return the set's images as small references, for comparisons without a VAE."""
    return References(torch.stack([thumbnail(to_floats(image)) for image in negation_set.images]).half())


def thumbnail(image: Tensor) -> Tensor:
    """Reduce an image (H, W, 3) in [0, 1] to (3, THUMBNAIL, THUMBNAIL)."""
    return fit(image.movedim(-1, 0), THUMBNAIL, THUMBNAIL)


def set_statistics(references: References, temperature: float) -> SetStatistics:
    """Compare the references with each other, at the temperature that Safe Denoiser uses."""
    sample = evenly_spread(len(references), STATISTICS_SAMPLE)
    chosen = References(references.latents[sample], prepare=references.prepare)
    device = chosen.latents.device
    contrast = reference_contrasts(chosen, device)
    among = torch.cat([similarities(z, chosen, contrast) for _, z in chosen.chunks(device)])
    first, second = torch.triu_indices(len(sample), len(sample), offset=1)
    values = among[first, second]
    best = values.topk(min(CLOSEST_PAIRS, len(values))).indices.tolist()
    closest = [(values[i].item(), int(sample[first[i]]), int(sample[second[i]])) for i in best]
    typical = leave_one_out(among, temperature).item()
    return SetStatistics(
        len(sample), values.mean().item(), typical, closest, int((values > NEAR_DUPLICATE).sum())
    )
