"""How the images of a set relate to each other: how alike they are, which ones nearly repeat, what the gate is calibrated to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.layouts import fit
from ..formats.negation_set import NegationSet
from ..guidance.core.references import References, evenly_spread
from ..guidance.safe_denoiser.similarity import (
    STATISTICS_SAMPLE,
    leave_one_out,
    reference_contrasts,
    similarities,
)

THUMBNAIL = 32
"""Side of the images that are compared when there is no VAE to encode them: what a latent of 256 pixels keeps."""

NEAR_DUPLICATE = 0.95
"""Images that resemble each other this much differ in details only."""


@dataclass(frozen=True)
class SetReport:
    """Figures about a set's images, or STATISTICS_SAMPLE of them spread over the set.

    Attributes:
        compared: how many images were compared.
        mean_similarity: of two different images; NaN for one image.
        typical: S_ref, what the calibrated mode's threshold is a share of.
        closest: the most similar pairs, best first, as (similarity, place, place).
        near_duplicates: pairs that are more alike than NEAR_DUPLICATE.
    """

    compared: int
    mean_similarity: float
    typical: float
    closest: list[tuple[float, int, int]]
    near_duplicates: int


def thumbnails(negation_set: NegationSet) -> References:
    """The set's images as small references, for comparisons without a VAE."""
    return References(torch.stack([thumbnail(image.float() / 255) for image in negation_set.images]).half())


def thumbnail(image: Tensor) -> Tensor:
    """(H, W, 3) in [0, 1] -> (3, THUMBNAIL, THUMBNAIL)."""
    return fit(image.movedim(-1, 0), THUMBNAIL, THUMBNAIL)


def report(references: References, temperature: float, pairs: int = 3) -> SetReport:
    """Compare the references with each other, at the temperature at which Safe Denoiser will."""
    sample = evenly_spread(len(references), STATISTICS_SAMPLE)
    chosen = References(references.latents[sample], prepare=references.prepare)
    device = chosen.latents.device
    contrast = reference_contrasts(chosen, device)
    among = torch.cat([similarities(z, chosen, contrast) for _, z in chosen.chunks(device)])
    first, second = torch.triu_indices(len(sample), len(sample), offset=1)
    values = among[first, second]
    best = values.topk(min(pairs, len(values))).indices.tolist()
    closest = [(values[i].item(), int(sample[first[i]]), int(sample[second[i]])) for i in best]
    typical = leave_one_out(among, temperature).item()
    return SetReport(
        len(sample), values.mean().item(), typical, closest, int((values > NEAR_DUPLICATE).sum())
    )
