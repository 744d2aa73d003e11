"""Detect-and-Guide as a correction: detection in the guider's own forward, guidance where needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....guidance.core.composition import Change
from ....guidance.core.noise_level import NoiseLevel
from ....guidance.detect_and_guide.attention_maps import Normalization, several_concepts
from ....guidance.detect_and_guide.guidance import bounded, guidance_term
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ....guidance.detect_and_guide.regulation import Detection, regulate
from ....guidance.detect_and_guide.settings import DetectAndGuideSettings
from ..attention.families import check_concepts, listen_for_maps
from ..attention.map_collector import MapCollector
from ..engine.correction import COND, UNCOND, Correction, RunContext, Step
from ..engine.run import Run

SAFETY = "safety"


@dataclass
class DetectionState:
    """State of one run: the attention maps of the current step, and the detection made from them.

    Attributes:
        collector: collects the token maps of the model's layers.
        mask: (1, 1, h, w) where to detect and act, or None for everywhere.
        detection: detection of the step being corrected.
        map: (B, 1, h, w) detection map of that step.
        held: (B,) bool, samples with a detection at an earlier step.
        total: sum of the token maps of earlier steps, per concept, when maps are stacked.
        count: number of these maps.
        first_pass_maps: detection maps of the first pass's steps.
        is_decided: True when `detection` and `map` come from the whole first pass and stay as they are.
    """

    collector: MapCollector
    mask: Tensor | None
    detection: Detection | None = None
    map: Tensor | None = None
    held: Tensor | None = None
    total: list[Tensor] | None = None
    count: int = 0
    first_pass_maps: list[Tensor] = field(default_factory=list)
    is_decided: bool = False


class DetectAndGuideCorrection(Correction):
    """Guidance away from a safety text, where and as strongly as guideline tokens are detected.

    Args:
        concepts: guideline tokens, one set or several.
        safety_text: CONDITIONING of the unwanted concept.
        settings: the method's constants.
        mask: (N, h, w), where to detect and act, the first one for all samples; None for everywhere.
        normalization: normalisation of the token maps, jointly or per token.
    """

    name = "DAG"

    def __init__(
        self,
        concepts: Sequence[GuidelineTokens],
        safety_text: list[Any],
        settings: DetectAndGuideSettings,
        mask: Tensor | None = None,
        normalization: Normalization = "joint",
    ) -> None:
        self.concepts, self.settings = tuple(concepts), settings
        self.mask, self.normalization = mask, normalization
        self.texts = {SAFETY: safety_text}
        self.two_pass = settings.look_first and settings.strength != 0
        self.background = max(concept.calibration.background for concept in concepts)

    def patch(self, model: ModelPatcher) -> None:
        check_concepts(model, self.concepts)
        if self.settings.strength == 0:
            return

        def collector_of(run: Run) -> MapCollector | None:
            state: DetectionState = run.state_of(self)
            return None if state.is_decided else state.collector

        listen_for_maps(model, self.concepts, collector_of)

    def begin(self, context: RunContext) -> DetectionState:
        mask = None
        if self.mask is not None:
            mask = F.interpolate(self.mask[:1, None].float(), size=context.image_shape[-2:], mode="area")
        return DetectionState(MapCollector(self.concepts), mask)

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def observe(self, step: Step, state: DetectionState) -> None:
        if state.is_decided:
            return
        found = self._detect(step, state)
        if not self.two_pass:
            self._decide(found, step, state)
        elif found is not None and step.is_new:
            state.first_pass_maps.append(found)

    def _decide(self, found: Tensor | None, step: Step, state: DetectionState) -> None:
        """Decide where and how strongly to guide at this step, from its detection map (B, 1, h, w)."""
        state.detection, state.map = None, found
        if found is None:
            return
        state.detection = self.regulate(found, self.settings, state.held)
        if step.is_new:
            state.held = state.detection.rows if state.held is None else state.held | state.detection.rows

    def regulate(self, found: Tensor, settings: DetectAndGuideSettings, held: Tensor | None) -> Detection:
        """Return where and how strongly to guide for a detection map (B, 1, h, w).

        Args:
            found: the detection map.
            settings: the method's constants.
            held: (B,) bool, samples in which the concept was detected before, or None for none.
        """
        return regulate(found, settings, self.background, held)

    def end_first_pass(self, state: DetectionState) -> Tensor | None:
        state.is_decided = True
        if not state.first_pass_maps:
            return None
        state.map = torch.stack(state.first_pass_maps).mean(0)  # (B, 1, h, w)
        # The mean over all steps separates objects, even if much of the image slightly exceeds the edit
        # threshold.
        settings = replace(self.settings, coverage=math.inf)
        found = self.regulate(state.map, settings, None)
        state.detection = self.regulate(state.map, settings, found.rows)
        rows = state.detection.rows
        return state.detection.scale > 0 if bool(rows.any()) else None

    def wanted_texts(self, step: Step, state: DetectionState) -> Mapping[str, Tensor]:
        if state.detection is None or not bool(state.detection.rows.any()):
            return {}
        names = (SAFETY, UNCOND, COND) if self.settings.host_mask == "SLD" else (SAFETY, UNCOND)
        return dict.fromkeys(names, state.detection.rows)

    def _detect(self, step: Step, state: DetectionState) -> Tensor | None:
        """Return the detection map of this step, (B, 1, h, w), or None if no suitable layer was called."""
        maps = state.collector.take(step)
        if maps is None:
            return None
        if self.settings.stacked:
            maps = self._stacked(maps, step, state)
        found = several_concepts([c.detection(m, self.normalization) for c, m in zip(self.concepts, maps)])
        return found if state.mask is None else found * state.mask.to(found)

    def _stacked(self, maps: list[Tensor], step: Step, state: DetectionState) -> list[Tensor]:
        """Return the mean of the token maps of all steps so far, per concept."""
        total = maps if state.total is None else [a + b for a, b in zip(state.total, maps)]
        count = state.count + 1
        if step.is_new:
            state.total, state.count = total, count
        return [t / count for t in total]

    def remarks(self, state: DetectionState) -> list[str]:
        found = []
        if state.collector.unheard:
            found.append(
                f"{self.name} saw no attention at {state.collector.unheard} model calls, so it detected "
                "nothing there: another node answers for the model (a cache) or changes its latents."
            )
        if state.collector.unplaced:
            found.append(
                f"{self.name} could not place what it saw at {state.collector.unplaced} model calls, so it "
                "detected nothing there: another node resizes or pads the tiles that it samples in."
            )
        return found

    def correct(self, step: Step, state: DetectionState) -> Change | None:
        detection = state.detection
        if detection is None or state.map is None or not bool(detection.rows.any()):
            return None
        if SAFETY not in step.predictions or UNCOND not in step.predictions:
            return None
        uncond = step.predictions[UNCOND].float()
        safety = step.predictions[SAFETY].float()
        cond = step.predictions.get(COND, uncond).float()
        delta = guidance_term(
            uncond, cond, safety, detection.scale, step.sigma, step.cond_scale, self.settings
        )
        if self.settings.bounded:
            delta = bounded(delta, step.denoised.float())
        area = (detection.scale > 0).flatten(1).float().mean(1)  # (B,)
        return Change(
            delta,
            detection.rows,
            gate=torch.where(detection.rows, state.map.flatten(1).amax(1), 0.0),
            area=area,
        )
