"""Variants of Detect-and-Guide that the study compares: the shipped settings and ablations of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...guidance.core.composition import per_sample
from ...guidance.core.noise_level import SigmaWindow
from ...guidance.detect_and_guide.regulation import Detection, lowest_edited, magnitude_scale
from ...guidance.detect_and_guide.settings import DetectAndGuideSettings
from ..runner import WORKFLOWS

NODE = "SafeGuidanceDAGDetectorGuide"
SAFETY_TITLE = "Safety text"


@dataclass(frozen=True)
class Variant:
    """One variant of the method.

    Attributes:
        settings: of the method.
        area_scaler: False gives every edited position the same scale, a tenth of the cap.
    """

    settings: DetectAndGuideSettings
    area_scaler: bool = True


ONE_PASS = {
    "look_first": False,
    "detection_threshold": 0.495,
    "hold_threshold": 0.2,
    "base": 50.0,
    "cap": 20.0,
}
"""Best settings without two-pass detection; all others are as shipped."""


def shipped_settings() -> tuple[DetectAndGuideSettings, str]:
    """Return the settings and the safety text of the workflow demo_dag."""
    workflow = json.loads((WORKFLOWS / "demo_dag.json").read_text(encoding="utf-8"))
    node = next(n for n in workflow["nodes"] if n["type"] == NODE)
    text = next(n for n in workflow["nodes"] if n.get("title") == SAFETY_TITLE)["widgets_values"][0]
    names = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    values = dict(zip(names, node["widgets_values"]))
    window = SigmaWindow(high=values.pop("start_sigma"), low=values.pop("end_sigma"))
    values.pop("normalization")
    return DetectAndGuideSettings(
        window=window, **{**values, "connectivity": int(values["connectivity"])}
    ), text


def variants(settings: DetectAndGuideSettings) -> dict[str, Variant]:
    """Return the variants: two-pass as shipped and one pass as in the paper, each with ablations."""
    one_pass = replace(settings, **ONE_PASS)
    return {
        "DAG": Variant(settings),
        **_ablations(settings),
        "one pass": Variant(one_pass),
        **{f"one pass, {name}": ablated for name, ablated in _ablations(one_pass).items()},
        "one pass, stacked maps": Variant(replace(one_pass, stacked=True)),
        "one pass, paper's constants": Variant(DetectAndGuideSettings()),
    }


def _ablations(settings: DetectAndGuideSettings) -> dict[str, Variant]:
    return {
        "without AreaScaler": Variant(settings, area_scaler=False),
        "without MagnitudeScaler": Variant(replace(settings, magnitude=1.0)),
        "not bounded": Variant(replace(settings, bounded=False)),
        "the paper's edit mask": Variant(replace(settings, core=0.0, reach=0.0)),
    }


def without_area_scaler(
    found: Detection, detection: Tensor, settings: DetectAndGuideSettings, background: float
) -> Detection:
    """Return a detection in which every edited position has the same scale, a tenth of the cap.

    The MagnitudeScaler and the strength multiply it as usual.

    Args:
        found: from `regulate`.
        detection: (B, 1, h, w), the detection map that it was made from.
        settings: the method's constants.
        background: values of the map where the concept is not.
    """
    edit_threshold = lowest_edited(settings, background)
    scale = 0.1 * settings.cap * magnitude_scale(detection, edit_threshold, settings.magnitude)
    scale = (settings.strength * scale).clamp(max=settings.cap) * found.edit
    return replace(found, scale=torch.where(per_sample(found.rows, scale), scale, torch.zeros_like(scale)))
