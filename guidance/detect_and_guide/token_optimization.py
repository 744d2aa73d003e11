"""Optimisation of guideline tokens on a few images with masks.

Only the tokens change; the model's attention is cached.

Li et al., Detect-and-Guide (CVPR 2025), section 3.1 and Table 4. The module `token_losses` describes the two
recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_cache import MapSource
from .token_losses import LOSSES, Recipe

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
NOISE = 0.3
"""Noise on start values that are used more than once, as a share of the embeddings' standard deviation."""


@dataclass(frozen=True)
class OptimizationSettings:
    """Settings of the optimisation.

    Attributes:
        recipe: loss and optimiser; `token_losses` describes the two.
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
    cache: MapSource,
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
    cache: MapSource,
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
def evaluate(cache: MapSource, embeddings: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return the mean loss over all images and noise levels."""
    losses = [
        loss_of(cache.probabilities(embeddings, level), cache.masks) for level in range(len(cache.sigmas))
    ]
    return float(torch.stack(losses).mean())
