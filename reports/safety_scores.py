"""Scores of a safety function: as JSON, in words, and drawn over the images."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..guidance.safety_functions.interface import Assessment, Region
from .overlays import overlay_regions

VERSION = 1


def verdicts(found: Assessment) -> list[dict[str, Any]]:
    """Return the score, the decision and the explanation of every image, for JSON."""
    scores, gates = found.level.tolist(), found.gate.tolist()
    return [
        {"score": score, "unsafe": gate, "explanation": explanation}
        for score, gate, explanation in zip(scores, gates, found.explanation)
    ]


def scores_json(function: str, found: Assessment, note: str = "") -> str:
    """Return the scores with their explanations and regions as JSON.

    Args:
        function: name of the safety function.
        found: its assessment of the images.
        note: sentence on what its verdicts do not mean, added if there is one.
    """
    images = [
        {
            **verdict,
            "score": round(verdict["score"], 6),
            "regions": [_region_data(region) for region in found.regions_of(index)],
        }
        for index, verdict in enumerate(verdicts(found))
    ]
    # The key of version 1, which workflows may read.
    content = {"version": VERSION, "function": function, "pictures": images}
    return json.dumps({**content, "note": note} if note else content, indent=1)


def _region_data(region: Region) -> dict[str, Any]:
    box = [round(side, 4) for side in region.box]
    return {"label": region.label, "score": round(region.score, 6), "box": box}


def overlay_scores(images: Tensor, found: Assessment) -> Tensor:
    """Draw every image's verdict and regions over it.

    Args:
        images: (B, H, W, C) in [0, 1]; channels after the third are dropped.
        found: the assessment of these images.

    Returns:
        (B, H, W, 3) in [0, 1].
    """
    return torch.stack(
        [
            overlay_regions(image[..., :3].float(), found.regions_of(index), bool(found.gate[index]))
            for index, image in enumerate(images)
        ]
    )


def scores_in_words(found: Assessment, note: str = "") -> str:
    """Return one line per image: its verdict, its score and its regions. A note follows if there is one."""
    lines = []
    for index, (score, gate) in enumerate(zip(found.level.tolist(), found.gate.tolist())):
        regions = "; ".join(f"{region.label} {region.score:.2f}" for region in found.regions_of(index))
        line = f"image {index + 1}: {'unsafe' if gate else 'safe'}, score {score:.3g}"
        lines.append(f"{line} ({regions})" if regions else line)
    return "\n".join([*lines, note] if note else lines)
