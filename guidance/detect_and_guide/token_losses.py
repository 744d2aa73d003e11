"""Losses for the optimisation of guideline tokens.

The recipe "paper" is that of Li et al., Detect-and-Guide (CVPR 2025), after Marcos-Manchón et al.,
Open-Vocabulary Attention Maps (CVPR 2024). With a small subject in a large image, it learns that the concept
is nowhere, and its maps find objects in general rather than the concept. The recipe "contrast" gives equal
weight to the concept, to the rest of the image and to the tenth of the rest with the largest error. It also
requires that the maps of images with the concept reach higher values than the maps of images without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_maps import normalize_jointly

Recipe = Literal["contrast", "paper"]

HARD_SHARE = 0.1
"""Share of the positions without the concept that "contrast" counts twice: those with the largest error."""
TEMPERATURE = 0.03
"""Softness of an image's soft maximum and of the comparison of two soft maxima, in units of probability."""


def paper_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Return the cross-entropy with the normalised maps of background and concept as logits.

    It is the mean over positions and tokens, between 0.3133 and 1.3133.

    Args:
        probabilities: (B, K, h, w).
        masks: (B, h, w) bool.
    """
    maps = normalize_jointly(probabilities)
    target = masks[:, None].expand_as(maps).long()  # (B, K, h, w)
    return F.cross_entropy(torch.stack([1 - maps, maps], 1), target)


def contrast_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Return the loss of the recipe "contrast": a binary cross-entropy plus a ranking of the images.

    The cross-entropy of the tokens' mean is the sum of the means inside the masks, outside of them (half
    weight) and over the tenth outside with the largest error. The ranking compares the soft maxima of images
    with the concept to those of images without it.

    Args:
        probabilities: (B, K, h, w).
        masks: (B, h, w) bool.
    """
    p = probabilities.mean(1).clamp(1e-5, 1 - 1e-5)  # (B, h, w)
    outside = -torch.log(1 - p[~masks])  # (positions without the concept,)
    hardest = outside.topk(min(len(outside), max(1, round(HARD_SHARE * len(outside))))).values
    terms = [-torch.log(p[masks]).mean()] if bool(masks.any()) else []
    if len(outside):
        terms += [0.5 * outside.mean(), hardest.mean()]
    shows = masks.flatten(1).any(1)  # (B,)
    if bool(shows.any()) and not bool(shows.all()):
        highest = TEMPERATURE * torch.logsumexp(p.flatten(1) / TEMPERATURE, 1)  # (B,)
        lead = highest[~shows][None] - highest[shows][:, None]  # (with, without)
        terms.append(F.softplus(lead / TEMPERATURE).mean())
    return torch.stack(terms).sum()


LOSSES: dict[Recipe, Callable[[Tensor, Tensor], Tensor]] = {"paper": paper_loss, "contrast": contrast_loss}
