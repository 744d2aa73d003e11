"""Optimisation of guideline tokens on a few images with masks.

Only the tokens change; the model's attention is cached.

Li et al., Detect-and-Guide (CVPR 2025), section 4.1 and Table 4; loss and layer rule after Marcos-Manchón et
al., Open-Vocabulary Attention Maps (CVPR 2024). The recipe "paper" is theirs. With a small subject in a large
image, it learns that the concept is nowhere, and its maps find objects in general rather than the concept.
The recipe "contrast" gives equal weight to the concept, to the rest of the image and to the tenth of the rest
with the largest error. It also requires that the maps of images with the concept reach higher values than the
maps of images without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_cache import AttentionCache
from .attention_maps import normalize_jointly
from .guideline_tokens import MapCalibration

Recipe = Literal["contrast", "paper"]

LEARNING_RATE, DECAY_EVERY, DECAY = 200.0, 20, 0.7
"""Plain gradient descent of the paper's Table 4."""
ITERATIONS_PER_IMAGE = 100
"""Iterations per image with the concept (paper)."""
CONTRAST_RATE = 0.1
"""Adam's learning rate for the recipe "contrast"."""
EVALUATE_EVERY = 20
"""Iterations between two evaluations on all images, from which the best tokens are kept."""
RETRIES = 3
"""Repetitions with half the learning rate after the loss became infinite or NaN."""
FALSE_ALARMS = 0.05
"""Share of the images without the concept that may exceed the calibrated threshold at some noise level."""
HARD_SHARE = 0.1
"""Share of the positions without the concept that "contrast" counts twice: those with the largest error."""
TEMPERATURE = 0.03
"""Softness of an image's soft maximum and of the comparison of two soft maxima, in units of probability."""
NOISE = 0.3
"""Noise on start values that are used more than once, as a share of the embeddings' standard deviation."""


@dataclass(frozen=True)
class OptimizationSettings:
    """Settings of the optimisation.

    Attributes:
        recipe: loss and optimiser; see the module's docstring.
        iterations: None for the paper's 100 per image with the concept.
        learning_rate: None for the recipe's own.
        levels: number of noise levels drawn for every iteration.
        batch: images of each kind, with and without the concept, per iteration.
        seed: of all random draws.
    """

    recipe: Recipe = "contrast"
    iterations: int | None = None
    learning_rate: float | None = None
    levels: int = 5
    batch: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Optimized:
    """Result of the optimisation.

    Attributes:
        embeddings: (1 + K, d), the best ones.
        losses: one per iteration.
        best: loss of the best embeddings on all images.
    """

    embeddings: Tensor
    losses: tuple[float, ...]
    best: float


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


def spread_start(embeddings: Tensor, tokens: int, seed: int) -> Tensor:
    """Return start values (1 + tokens, d) from embeddings (1 + K, d).

    The K concept embeddings are used in turn. If one is used more than once, all get noise, so that they can
    learn different features.
    """
    concept = embeddings[1:]
    repeated = concept[torch.arange(tokens) % len(concept)]
    noise = NOISE * torch.randn(repeated.shape, generator=torch.Generator().manual_seed(seed))
    if tokens > len(concept):
        repeated = repeated + noise * concept.std()
    return torch.cat([embeddings[:1], repeated])


def optimize(
    cache: AttentionCache,
    start: Tensor,
    settings: OptimizationSettings,
    watch: Callable[[int, int, float, Tensor], None] | None = None,
) -> Optimized:
    """Optimise embeddings on a cache; the same cache, start and settings give the same result.

    Args:
        cache: of images with the concept and, if there are any, images without it.
        start: (1 + K, d) start values.
        settings: of the optimisation.
        watch: called with iteration, number of iterations, loss and the current embeddings; may raise to
            stop.

    Raises:
        ValueError: no image has a mask, or the loss is infinite or NaN even at small learning rates.
    """
    shown = [i for i, mask in enumerate(cache.masks) if bool(mask.any())]
    clean = [i for i in range(len(cache)) if i not in set(shown)]
    if not shown:
        raise ValueError(
            "No image has a mask of the concept. Connect masks that are white where the concept is."
        )
    iterations = settings.iterations or ITERATIONS_PER_IMAGE * len(shown)
    learning_rate = settings.learning_rate or (LEARNING_RATE if settings.recipe == "paper" else CONTRAST_RATE)
    for _ in range(RETRIES + 1):
        found = _descend(cache, start, settings, shown, clean, iterations, learning_rate, watch)
        if found is not None:
            return found
        learning_rate /= 2
    raise ValueError(
        "The loss is infinite or not a number. "
        "Check that images, masks and model belong together, or lower the learning rate."
    )


def _descend(
    cache: AttentionCache,
    start: Tensor,
    settings: OptimizationSettings,
    shown: list[int],
    clean: list[int],
    iterations: int,
    learning_rate: float,
    watch: Callable[[int, int, float, Tensor], None] | None,
) -> Optimized | None:
    """Optimise at one learning rate; None when the loss or its gradient becomes infinite or NaN."""
    generator = torch.Generator().manual_seed(settings.seed)
    embeddings = start.detach().float().clone().requires_grad_(True)
    optimizer, schedule = _optimizer(embeddings, settings.recipe, learning_rate, iterations)
    loss_of = LOSSES[settings.recipe]
    best, kept, losses = math.inf, start, []
    for iteration in range(iterations):
        indices = _drawn(shown, settings.batch, generator) + _drawn(clean, settings.batch, generator)
        levels = torch.randperm(len(cache.sigmas), generator=generator)[: settings.levels].tolist()
        chosen = torch.tensor(indices, dtype=torch.long)
        masks = cache.masks[chosen]
        maps = [cache.probabilities(embeddings, level, chosen) for level in levels]
        loss = torch.stack([loss_of(of_level, masks) for of_level in maps]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = embeddings.grad
        if gradient is None or not bool(torch.isfinite(loss)) or not bool(torch.isfinite(gradient).all()):
            return None
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (iteration + 1) % EVALUATE_EVERY == 0 or iteration + 1 == iterations:
            total = evaluate(cache, embeddings.detach(), loss_of)
            if total < best:
                best, kept = total, embeddings.detach().clone()
        if watch is not None:
            watch(iteration, iterations, losses[-1], embeddings.detach())
    return Optimized(kept, tuple(losses), best)


def _optimizer(
    embeddings: Tensor, recipe: Recipe, learning_rate: float, iterations: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the recipe's optimiser and the schedule of its learning rate."""
    if recipe == "paper":
        descent = torch.optim.SGD([embeddings], lr=learning_rate)
        return descent, torch.optim.lr_scheduler.StepLR(descent, DECAY_EVERY, DECAY)
    adam = torch.optim.Adam([embeddings], lr=learning_rate)
    return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)


def _drawn(indices: list[int], count: int, generator: torch.Generator) -> list[int]:
    """Draw up to `count` of the indices without repetition."""
    return [indices[i] for i in torch.randperm(len(indices), generator=generator)[:count].tolist()]


@torch.no_grad()
def evaluate(cache: AttentionCache, embeddings: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return the mean loss over all images and noise levels."""
    losses = [
        loss_of(cache.probabilities(embeddings, level), cache.masks) for level in range(len(cache.sigmas))
    ]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def detections(cache: AttentionCache, embeddings: Tensor) -> Tensor:
    """Return the concept tokens' mean probability at all noise levels, not calibrated: (levels, N, h, w)."""
    return torch.stack([cache.probabilities(embeddings, level).mean(1) for level in range(len(cache.sigmas))])


def calibrate_maps(maps: Tensor, masks: Tensor) -> MapCalibration:
    """Measure the threshold and the background of maps.

    All but a few images without the concept stay below the threshold at every noise level. When the maxima of
    the two kinds of images do not overlap, the threshold is the middle between them. Without images of both
    kinds it is the papers' 1/2.

    Args:
        maps: (levels, N, h, w) from `detections`, preferably of images that the tokens have not learnt from.
        masks: (N, h, w) bool.
    """
    shows = masks.flatten(1).any(1)  # (N,)
    threshold = 0.5
    if bool(shows.any()) and not bool(shows.all()):
        highest = maps.flatten(2).amax(2).amax(0)  # (N,)
        with_concept = highest[shows]
        without = highest[~shows]
        apart = bool(with_concept.min() > without.max())
        between = (with_concept.min() + without.max()) / 2
        threshold = float((between if apart else without.quantile(1 - FALSE_ALARMS)).clamp(0.01, 0.99))
    calibrated = normalize_jointly(MapCalibration(threshold).apply(maps))
    elsewhere = calibrated[:, ~masks].flatten()
    background = float(elsewhere.quantile(0.95)) if 0 < elsewhere.numel() < 2**24 else 0.0
    return MapCalibration(threshold, min(1.0, max(0.0, background)))


def overlap(maps: Tensor, masks: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the intersection over union of maps at a threshold with masks.

    Args:
        maps: (..., N, h, w).
        masks: (N, h, w) bool.
        threshold: value from which a position of a map counts as found.

    Returns:
        (..., N), NaN where nothing is found and the mask is empty.
    """
    found = maps >= threshold
    intersection = (found & masks).flatten(-2).sum(-1)
    union = (found | masks).flatten(-2).sum(-1)
    return intersection / union
