"""Guideline tokens in the host: from words, and learnt from images with progress, previews and interruption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ....guidance.detect_and_guide.attention_cache import AttentionCache
from ....guidance.detect_and_guide.attention_maps import normalize_jointly
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens, from_text
from ....guidance.detect_and_guide.token_optimization import (
    OptimizationSettings,
    calibrate,
    detections,
    optimize,
    overlap,
    spread_start,
)
from ....reports.curves import overlay
from ..engine.conditioning import encode, encode_each
from .capture import attention_width, family
from .recording import look_at

PREVIEW_EVERY = 20
PREVIEW_SIDE = 256
FEWEST_TO_HOLD_OUT = 8
"""Fewer images are all learnt from; of these or more, every fourth of either kind is held out."""
CLIP_LENGTH = 77


@dataclass(frozen=True)
class Example:
    """Images to learn from.

    Attributes:
        images: (N, H, W, 3) in [0, 1].
        masks: (N, H, W) in [0, 1], white where the concept is, black for images without it.
    """

    images: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Learnt:
    """Result of learning.

    Attributes:
        tokens: with calibration and held-out overlap.
        losses: of every iteration.
        report: lines for people.
    """

    tokens: GuidelineTokens
    losses: tuple[float, ...]
    report: str


def tokens_from_text(clip: Any, words: str, whole_phrase: bool, family_name: str = "") -> GuidelineTokens:
    """Tokens from a text encoder, not optimised."""
    hidden = encode(clip, words)[0][0][0]
    pieces = _word_pieces(clip, words)
    return from_text(hidden, 1, 1 + pieces, words, whole_phrase, family_name)


def _word_pieces(clip: Any, words: str) -> int:
    """How many word pieces the first tokenizer makes of a phrase: what an empty phrase has not."""

    def tokens(text: str) -> list[Any]:
        return [piece[0] for piece in next(iter(clip.tokenize(text).values()))[0]]

    empty, phrase = tokens(""), tokens(words)
    padding = empty[-1]
    end = next(
        (i for i, token in enumerate(phrase) if i > 0 and (token == empty[1] or token == padding)),
        len(phrase),
    )
    return end - 1


def look_at_images(
    model: ModelPatcher,
    clip: Any,
    vae: Any,
    example: Example,
    captions: Sequence[str],
    sigmas: Sequence[float],
    layers: Sequence[int],
    seed: int,
) -> AttentionCache:
    """What the model's attention asks of given images under noise at chosen levels, under a caption for each.

    Raises:
        ValueError: the model has no cross-attention, or none of the layers.
    """
    attention_width(model)
    return look_at(
        model, vae.encode(example.images), example.masks, encode_each(clip, captions), sigmas, layers, seed
    )


def learn(
    model: ModelPatcher,
    clip: Any,
    example: Example,
    cache: AttentionCache,
    words: str,
    count: int,
    settings: OptimizationSettings,
) -> Learnt:
    """Optimise `count` concept tokens on what the model's attention asked of the example's images, calibrate and measure them.

    Raises:
        ValueError: the model has no cross-attention, or another one than the cache is of; the cache is of another number of
            images; or no image has a mask.
    """
    width = attention_width(model)
    start = tokens_from_text(clip, words, count > 1, family(model))
    start.check_fits(family(model), width)
    if len(cache) != len(example.images):
        raise ValueError(
            f"Attention was recorded for {len(cache)} images, but {len(example.images)} are connected. Connect the same."
        )
    if cache.key_weights[0].shape[1] != width:
        raise ValueError(
            "Attention was recorded with a model of another family. Connect the MODEL that made the images."
        )
    # Nodes run under inference mode, whose tensors cannot be differentiated through.
    with torch.inference_mode(False), torch.enable_grad():
        return _learnt(
            _normal(cache.with_masks(example.masks)), start, count, settings, example.images.clone()
        )


def _normal(cache: AttentionCache) -> AttentionCache:
    queries = tuple(tuple(q.clone() for q in level) for level in cache.queries)
    return replace(
        cache,
        key_weights=tuple(w.clone() for w in cache.key_weights),
        queries=queries,
        masks=cache.masks.clone(),
    )


def _learnt(
    cache: AttentionCache, start: GuidelineTokens, count: int, settings: OptimizationSettings, images: Tensor
) -> Learnt:
    held = held_out(cache.masks)
    training = cache.images([i for i in range(len(cache)) if i not in held])
    progress = comfy.utils.ProgressBar(1)
    shown = (
        next(i for i, mask in enumerate(training.masks) if bool(mask.any()))
        if bool(training.masks.any())
        else 0
    )
    image = images[[i for i in range(len(cache)) if i not in held][shown]]

    def watch(iteration: int, iterations: int, loss: float, embeddings: Tensor) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if iteration % PREVIEW_EVERY == 0 and progress.hook is not None:
            preview = ("JPEG", _preview(training, embeddings, shown, image), PREVIEW_SIDE)
        progress.update_absolute(iteration + 1, iterations, preview)

    found = optimize(training, spread_start(start.embeddings.clone(), count, settings.seed), settings, watch)
    tested = cache.images(held) if held else training
    calibration = calibrate(detections(tested, found.embeddings), tested.masks)
    iou = _mean_overlap(tested, found.embeddings, calibration.apply)
    tokens = GuidelineTokens(
        found.embeddings,
        family=start.family,
        words=start.words,
        name=start.words,
        layers=cache.layers,
        sigmas=cache.sigmas,
        calibration=calibration,
        iou=iou if held else None,
    )
    where = f"on {len(held)} held-out images" if held else "on the images it learnt from"
    report = (
        f"{len(training)} images learnt from, loss {found.losses[0]:.4f} to {found.losses[-1]:.4f}, best {found.best:.4f}\n"
        f"overlap with the masks {where}: {iou:.2f}\n"
        f"threshold {calibration.threshold:.3f}, background {calibration.background:.3f}\n"
        f"layers: {', '.join(cache.layers)}"
    )
    return Learnt(tokens, found.losses, report)


def held_out(masks: Tensor) -> list[int]:
    """Every fourth image with and every fourth without the concept, when there are enough of both kinds together."""
    if len(masks) < FEWEST_TO_HOLD_OUT:
        return []
    shows = masks.flatten(1).any(1).tolist()
    kinds = [[i for i, s in enumerate(shows) if s], [i for i, s in enumerate(shows) if not s]]
    return sorted(i for kind in kinds for i in kind[3::4])


def _mean_overlap(cache: AttentionCache, embeddings: Tensor, calibrated: Any) -> float:
    shows = cache.masks.flatten(1).any(1)
    if not bool(shows.any()):
        return 0.0
    maps = normalize_jointly(calibrated(detections(cache, embeddings)))
    return float(overlap(maps[:, shows], cache.masks[shows]).nan_to_num().mean())


def _preview(cache: AttentionCache, embeddings: Tensor, row: int, image: Tensor) -> Image.Image:
    """The image with its map of the middle noise level."""
    with torch.no_grad():
        p = cache.probabilities(embeddings, len(cache.sigmas) // 2, torch.tensor([row])).mean(1, keepdim=True)
    map_ = torch.nn.functional.interpolate(normalize_jointly(p), size=image.shape[:2], mode="bilinear")[0, 0]
    return Image.fromarray((overlay(image[..., :3].cpu(), map_) * 255).byte().numpy())
