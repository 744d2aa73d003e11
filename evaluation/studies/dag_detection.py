"""Figures of the detector of Detect-and-Guide on held-out scenes of the demo world."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...demo.annotated_set import draw_annotated_set
from ...guidance.detect_and_guide.annotated_images import annotate
from ...guidance.detect_and_guide.attention_cache import AttentionCache
from ...guidance.detect_and_guide.attention_maps import concept_probability, normalize_jointly
from ...guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ...guidance.detect_and_guide.token_evaluation import overlap
from ..in_process_sampler import InProcessSampler

LEVELS = (7.0, 5.0, 3.0, 2.0, 1.0, 0.5)
HELD_OUT_SEED = 977
FALSE_ALARMS = 0.05
ROC = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
"""False alarm rates at which the hit rate is given."""


@dataclass(frozen=True)
class DetectorRow:
    """One detector at one noise level, on held-out scenes.

    Attributes:
        auc: probability that an image with a star has a higher maximum than one without.
        hits: hit rate on images with a star at the threshold with the false alarm rate FALSE_ALARMS.
        roc: hit rates at the false alarm rates ROC.
        iou: mean overlap of the calibrated map with the true mask, at the threshold and at the best one for
            all images.
    """

    tokens: str
    sigma: float
    auc: float
    hits: float
    roc: tuple[float, ...]
    iou: float
    best_iou: float


def area_under_curve(with_concept: Tensor, without: Tensor) -> float:
    """Return the probability that a value with the concept exceeds one without; ties count half."""
    larger = (with_concept[:, None] > without[None]).double() + 0.5 * (with_concept[:, None] == without[None])
    return float(larger.mean())


def detection_figures(
    sampler: InProcessSampler, learnt: GuidelineTokens, scenes: int
) -> list[dict[str, Any]]:
    """Measure the detector on held-out scenes, with learnt tokens and with tokens from text."""
    from ...nodes.host.attention.tokens_from_text import tokens_from_text

    detectors = {
        "learnt": learnt,
        "from text": replace(tokens_from_text(sampler.clip, "star", False), layers=learnt.layers),
    }
    cache = held_out_cache(sampler.model, sampler.clip, sampler.vae, learnt.layers, scenes)
    rows = [asdict(row) for name, tokens in detectors.items() for row in detector_rows(name, tokens, cache)]
    for row in rows:
        write_line(row)
    return rows


def held_out_cache(
    model: Any, clip: Any, vae: Any, layers: Sequence[int | str], count: int
) -> AttentionCache:
    """Record the attention of `count` held-out scenes with stars and as many without."""
    from ...nodes.host.attention.annotated_recording import record_images

    scenes = draw_annotated_set(count, HELD_OUT_SEED)
    example = annotate(scenes.images, scenes.masks, scenes.safe_images)
    return record_images(model, clip, vae, example, scenes.captions, LEVELS, layers, HELD_OUT_SEED)


def detector_rows(name: str, tokens: GuidelineTokens, cache: AttentionCache) -> Iterator[DetectorRow]:
    """Yield a row for each noise level of the cache."""
    shows = cache.masks.flatten(1).any(1)
    for level, sigma in enumerate(cache.sigmas):
        with torch.no_grad():
            p = concept_probability(cache.maps(tokens.embeddings, level))[:, 0]
        highest = p.flatten(1).amax(1)

        def found(false_alarms: float, highest: Tensor = highest) -> float:
            return float((highest[shows] > highest[~shows].quantile(1 - false_alarms)).double().mean())

        detection = normalize_jointly(tokens.calibration.apply(p[:, None]))[:, 0]
        overlaps = [
            float(overlap(detection, cache.masks, t)[shows].mean())
            for t in torch.linspace(0.05, 0.95, 19).tolist()
        ]
        yield DetectorRow(
            name,
            sigma,
            area_under_curve(highest[shows], highest[~shows]),
            found(FALSE_ALARMS),
            tuple(found(share) for share in ROC),
            float(overlap(detection, cache.masks)[shows].mean()),
            max(overlaps),
        )


def write_line(figures: Mapping[str, Any]) -> None:
    """Write figures to stdout as one line of JSON."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()
