"""Learn guideline tokens from a few images with masks: only the tokens change, the model's attention is cached.

Kim et al., Detect-and-Guide (CVPR 2025), section 4.1 and Table 4; loss and layer rule after Marcos-Manchón et al., Open-
Vocabulary Attention Maps (CVPR 2024). The recipe "paper" is theirs. With a small thing in a large image it learns that nothing
is anywhere, and its maps find objects rather than the concept. "contrast" weighs the concept, the rest and the most mistaken
tenth of the rest alike, and asks that images with the concept reach higher than images without.
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
from .guideline_tokens import Calibration

Recipe = Literal["contrast", "paper"]

LEARNING_RATE, DECAY_EVERY, DECAY = 200.0, 20, 0.7
"""Plain gradient descent of the paper's Table 4."""
ITERATIONS_PER_IMAGE = 100
CONTRAST_RATE = 0.1
EVALUATE_EVERY = 20
RETRIES = 3
FALSE_ALARMS = 0.05
"""Share of the images without the concept that the calibrated threshold lets through at any noise level."""
HARD_SHARE = 0.1
TEMPERATURE = 0.03
"""Softness of an image's maximum, and of the comparison between two images' maxima, in units of probability."""
NOISE = 0.3
"""Spread of the starting values when several tokens start from the same word, so that they can learn different things."""


@dataclass(frozen=True)
class OptimizationSettings:
    """How to learn.

    Attributes:
        recipe: see the module.
        iterations: None for the paper's 100 for every image with the concept.
        learning_rate: None for the recipe's own.
        levels: noise levels drawn for every iteration.
        batch: images of each kind per iteration.
        seed: of everything drawn.
    """

    recipe: Recipe = "contrast"
    iterations: int | None = None
    learning_rate: float | None = None
    levels: int = 5
    batch: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Optimized:
    """Result: the best embeddings (1 + K, d), the loss of every iteration, and the best one's loss on all images."""

    embeddings: Tensor
    losses: tuple[float, ...]
    best: float


def paper_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy with the normalised maps of background and concept as logits, mean over positions and tokens.

    Its floor is .3133, its ceiling 1.3133.

    Args:
        probabilities: (B, K, h, w).
        masks: (B, h, w) bool.
    """
    maps = normalize_jointly(probabilities)
    target = masks[:, None].expand_as(maps).long()
    return F.cross_entropy(torch.stack([1 - maps, maps], 1), target)


def contrast_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy of the tokens' mean, inside the masks, outside, and on the most mistaken tenth outside, plus a ranking
    of the images' soft maxima."""
    p = probabilities.mean(1).clamp(1e-5, 1 - 1e-5)
    outside = -torch.log(1 - p[~masks])
    hardest = outside.topk(min(len(outside), max(1, round(HARD_SHARE * len(outside))))).values
    terms = [-torch.log(p[masks]).mean()] if bool(masks.any()) else []
    if len(outside):
        terms += [0.5 * outside.mean(), hardest.mean()]
    shows = masks.flatten(1).any(1)
    if bool(shows.any()) and not bool(shows.all()):
        highest = TEMPERATURE * torch.logsumexp(p.flatten(1) / TEMPERATURE, 1)
        terms.append(F.softplus((highest[~shows][None] - highest[shows][:, None]) / TEMPERATURE).mean())
    return torch.stack(terms).sum()


LOSSES: dict[Recipe, Callable[[Tensor, Tensor], Tensor]] = {"paper": paper_loss, "contrast": contrast_loss}


def spread_start(embeddings: Tensor, tokens: int, seed: int) -> Tensor:
    """Starting values with `tokens` concept rows: the given ones in turn, told apart by noise where a row is used again."""
    concept = embeddings[1:]
    rows = concept[torch.arange(tokens) % len(concept)]
    noise = NOISE * torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    if tokens > len(concept):
        rows = rows + noise * concept.std()
    return torch.cat([embeddings[:1], rows])


def optimize(
    cache: AttentionCache,
    start: Tensor,
    settings: OptimizationSettings,
    watch: Callable[[int, int, float, Tensor], None] | None = None,
) -> Optimized:
    """Learn embeddings from a cache; the same cache, start and settings give the same result.

    Args:
        cache: images with and, if there are any, without the concept.
        start: (1 + K, d) starting values.
        watch: called with iteration, number of iterations, loss and the current embeddings; may raise to stop.

    Raises:
        ValueError: no image has a mask, or the loss is not a number even at small learning rates.
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
        "The loss is not a number. Check that images, masks and model belong together, or lower the learning rate."
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
    """One run at one learning rate; None when the loss stops being a number."""
    generator = torch.Generator().manual_seed(settings.seed)
    embeddings = start.detach().float().clone().requires_grad_(True)
    optimizer, schedule = _optimizer(embeddings, settings.recipe, learning_rate, iterations)
    loss_of = LOSSES[settings.recipe]
    best, kept, losses = math.inf, start, []
    for iteration in range(iterations):
        rows = _drawn(shown, settings.batch, generator) + _drawn(clean, settings.batch, generator)
        levels = torch.randperm(len(cache.sigmas), generator=generator)[: settings.levels].tolist()
        chosen = torch.tensor(rows, dtype=torch.long)
        loss = torch.stack(
            [loss_of(cache.probabilities(embeddings, level, chosen), cache.masks[chosen]) for level in levels]
        ).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if not (
            bool(torch.isfinite(loss))
            and embeddings.grad is not None
            and bool(torch.isfinite(embeddings.grad).all())
        ):
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
    if recipe == "paper":
        descent = torch.optim.SGD([embeddings], lr=learning_rate)
        return descent, torch.optim.lr_scheduler.StepLR(descent, DECAY_EVERY, DECAY)
    adam = torch.optim.Adam([embeddings], lr=learning_rate)
    return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)


def _drawn(rows: list[int], count: int, generator: torch.Generator) -> list[int]:
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:count].tolist()]


@torch.no_grad()
def evaluate(cache: AttentionCache, embeddings: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean loss over all images and noise levels."""
    losses = [
        loss_of(cache.probabilities(embeddings, level), cache.masks) for level in range(len(cache.sigmas))
    ]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def detections(cache: AttentionCache, embeddings: Tensor) -> Tensor:
    """Mean probability of the concept at all noise levels, not calibrated: (levels, N, h, w)."""
    return torch.stack([cache.probabilities(embeddings, level).mean(1) for level in range(len(cache.sigmas))])


def calibrate(maps: Tensor, masks: Tensor) -> Calibration:
    """Threshold that all but a few images without the concept stay below at every noise level, and the background beside it.

    Without images of both kinds the threshold is the papers' 1/2; when the kinds do not overlap it is the middle between them.

    Args:
        maps: (levels, N, h, w) from `detections`, best of images that were not learnt from.
        masks: (N, h, w) bool.
    """
    shows = masks.flatten(1).any(1)
    threshold = 0.5
    if bool(shows.any()) and not bool(shows.all()):
        highest = maps.flatten(2).amax(2).amax(0)
        with_concept, without = highest[shows], highest[~shows]
        apart = bool(with_concept.min() > without.max())
        between = (with_concept.min() + without.max()) / 2
        threshold = float((between if apart else without.quantile(1 - FALSE_ALARMS)).clamp(0.01, 0.99))
    calibrated = normalize_jointly(Calibration(threshold).apply(maps))
    elsewhere = calibrated[:, ~masks].flatten()
    background = float(elsewhere.quantile(0.95)) if 0 < elsewhere.numel() < 2**24 else 0.0
    return Calibration(threshold, min(1.0, max(0.0, background)))


def overlap(maps: Tensor, masks: Tensor, threshold: float = 0.5) -> Tensor:
    """Intersection over union of maps (..., N, h, w) at a threshold with masks (N, h, w): (..., N), NaN where both are empty."""
    found = maps >= threshold
    together, either = (found & masks).flatten(-2).sum(-1), (found | masks).flatten(-2).sum(-1)
    return together / either
