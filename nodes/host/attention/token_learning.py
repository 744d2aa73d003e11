"""Guideline tokens learnt from annotated images and the attention recorded for them.

Learning shows progress and previews, and can be interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ....guidance.detect_and_guide.annotated_images import AnnotatedImages
from ....guidance.detect_and_guide.attention_cache import AttentionCache, MapSource
from ....guidance.detect_and_guide.attention_maps import normalize_jointly
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration
from ....guidance.detect_and_guide.token_evaluation import calibrate_maps, detections, overlap
from ....guidance.detect_and_guide.token_optimization import OptimizationSettings, optimize, spread_start
from ....reports.overlays import overlay_map
from ..autograd.differentiable_layers import differentiable
from .capture import family
from .families import learning_width
from .joint_families import joint_family
from .joint_recording import JointRecording
from .tokens_from_text import tokens_from_text

PREVIEW_EVERY = 20
"""Iterations between two previews."""
PREVIEW_SIDE = 256
"""Longest side of a preview in pixels."""
FEWEST_TO_HOLD_OUT = 8
"""Number of images from which every fourth image of each kind is held out.

With fewer, all are learnt from.
"""


@dataclass(frozen=True)
class Learnt:
    """Result of learning.

    Attributes:
        tokens: with their calibration and their overlap with the masks of held-out images.
        losses: one per iteration.
        report: lines for people.
    """

    tokens: GuidelineTokens
    losses: tuple[float, ...]
    report: str


def learn(
    model: ModelPatcher,
    clip: Any,
    annotated: AnnotatedImages,
    cache: AttentionCache | JointRecording,
    words: str,
    count: int,
    settings: OptimizationSettings,
) -> Learnt:
    """Optimise tokens on recorded attention, calibrate them, and measure their overlap with the masks.

    Args:
        model, clip: the host's models.
        annotated: the images.
        cache: attention recorded for these images.
        words: the concept, from which the optimisation starts.
        count: number of concept tokens.
        settings: of the optimisation.

    Raises:
        ValueError: the model has no cross-attention, or another one than that of the cache; the cache is of
            another number of images; or no image has a mask.
    """
    width = learning_width(model)
    start = tokens_from_text(clip, words, count > 1, family(model))
    start.check_fits(family(model), width)
    if len(cache) != len(annotated):
        raise ValueError(
            f"Attention was recorded for {len(cache)} images, but {len(annotated)} are connected. "
            "Connect the images for which it was recorded."
        )
    is_joint = joint_family(model.model.diffusion_model) is not None
    if is_joint != isinstance(cache, JointRecording) or cache.width != width:
        raise ValueError(
            "Attention was recorded with a model of another family. Connect the MODEL that made the images."
        )
    if isinstance(cache, JointRecording):
        comfy.model_management.load_models_gpu([model])
        with differentiable(model.model.diffusion_model):
            masked = cache.with_masks(annotated.masks.clone())
            return _learnt(masked, start, count, settings, annotated.images.clone())
    # Nodes run under inference mode. Gradients cannot flow through its tensors, so copy them.
    with torch.inference_mode(False), torch.enable_grad():
        copy = _copied(cache.with_masks(annotated.masks))
        return _learnt(copy, start, count, settings, annotated.images.clone())


def _copied(cache: AttentionCache) -> AttentionCache:
    """Return the cache with copies of all tensors."""
    queries = tuple(tuple(q.clone() for q in level) for level in cache.queries)
    return replace(
        cache,
        key_weights=tuple(w.clone() for w in cache.key_weights),
        queries=queries,
        masks=cache.masks.clone(),
    )


def _learnt(
    cache: MapSource, start: GuidelineTokens, count: int, settings: OptimizationSettings, images: Tensor
) -> Learnt:
    """Optimise tokens on the images that are not held out and measure them on the others.

    Without held-out images, they are measured on all.
    """
    held = held_out(cache.masks)
    taught = [i for i in range(len(cache)) if i not in held]
    training = cache.images(taught)
    tested = cache.images(held) if held else training
    first = spread_start(start.embeddings.clone(), count, settings.seed)
    found = optimize(training, first, settings, _progress(training, images[taught]))
    calibration = calibrate_maps(detections(tested, found.embeddings), tested.masks)
    iou = _mean_overlap(tested, found.embeddings, calibration)
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
    where = f"on {len(held)} held-out images" if held else "on the images that were learnt from"
    report = (
        f"{len(training)} images learnt from, loss {found.losses[0]:.4f} to {found.losses[-1]:.4f}, "
        f"best {found.best:.4f}\n"
        f"overlap with the masks {where}: {iou:.2f}\n"
        f"threshold {calibration.threshold:.3f}, background {calibration.background:.3f}\n"
        f"layers: {', '.join(cache.layers)}"
    )
    return Learnt(tokens, found.losses, report)


def _progress(training: MapSource, images: Tensor) -> Callable[[int, int, float, Tensor], None]:
    """Return a callback that shows progress and previews.

    It raises when the user interrupts. Previews show the first image with the concept.
    """
    progress = comfy.utils.ProgressBar(1)
    shows = training.masks.flatten(1).any(1)
    index = int(shows.int().argmax())  # the first image with the concept, or 0

    def watch(iteration: int, iterations: int, loss: float, embeddings: Tensor) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if iteration % PREVIEW_EVERY == 0 and progress.hook is not None:
            preview = ("JPEG", _preview(training, embeddings, index, images[index]), PREVIEW_SIDE)
        progress.update_absolute(iteration + 1, iterations, preview)

    return watch


def held_out(masks: Tensor) -> list[int]:
    """Return the indices of every fourth image of either kind, with and without the concept.

    If there are few images, none is held out.

    Args:
        masks: (N, h, w) bool.
    """
    if len(masks) < FEWEST_TO_HOLD_OUT:
        return []
    shows = masks.flatten(1).any(1).tolist()
    with_concept = [i for i, s in enumerate(shows) if s]
    without = [i for i, s in enumerate(shows) if not s]
    return sorted([*with_concept[3::4], *without[3::4]])


def _mean_overlap(cache: MapSource, embeddings: Tensor, calibration: MapCalibration) -> float:
    """Return the mean intersection over union of calibrated maps and masks.

    It is the mean over noise levels and images with the concept.
    """
    shows = cache.masks.flatten(1).any(1)
    if not bool(shows.any()):
        return 0.0
    maps = normalize_jointly(calibration.apply(detections(cache, embeddings)))
    return float(overlap(maps[:, shows], cache.masks[shows]).nan_to_num().mean())


def _preview(cache: MapSource, embeddings: Tensor, index: int, image: Tensor) -> Image.Image:
    """Draw the map of the middle noise level over one of the cache's images (H, W, 3)."""
    with torch.no_grad():
        level = len(cache.sigmas) // 2
        p = cache.probabilities(embeddings, level, torch.tensor([index])).mean(1, keepdim=True)
    size = image.shape[:2]
    map_ = torch.nn.functional.interpolate(normalize_jointly(p), size=size, mode="bilinear")[0, 0]
    return Image.fromarray((overlay_map(image[..., :3].cpu(), map_) * 255).byte().numpy())
