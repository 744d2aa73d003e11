"""Detect-and-Guide as a correction: maps from the guider's own forward, the safety text only for samples that need it."""

from __future__ import annotations

import logging
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
from ....guidance.detect_and_guide.guidance import (
    DetectAndGuideSettings,
    Detection,
    bounded,
    guidance_term,
    regulate,
)
from ....guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..attention.capture import MapCollector, attention_width, family, listen
from ..engine.correction import COND, UNCOND, Correction, RunContext, Step
from ..engine.run import Run

log = logging.getLogger(__name__)
SAFETY = "safety"


@dataclass
class DetectionState:
    """Of one run: what the current step's layers said, and what was made of it.

    Attributes:
        collector: hears the layers.
        guider: of the run; None until the first layer was heard.
        mask: (1, 1, h, w) where to look and act, or None for everywhere.
        detection: of the step being corrected.
        map: (B, 1, h, w) detection map of that step.
        held: (B,) bool, samples in which something was detected at an earlier step.
        total, count: sum and number of the token maps of earlier steps, per concept, when maps are stacked.
        seen: detection maps of a rehearsal's steps.
        decided: whether `detection` and `map` are those of the whole rehearsal.
        warned: whether the log has said that there is no negative conditioning.
    """

    collector: MapCollector
    mask: Tensor | None
    guider: Any = None
    detection: Detection | None = None
    map: Tensor | None = None
    held: Tensor | None = None
    total: list[Tensor] | None = None
    count: int = 0
    seen: list[Tensor] = field(default_factory=list)
    decided: bool = False
    warned: bool = False


class DetectAndGuideCorrection(Correction):
    """Guides away from a safety text where, and as hard as, guideline tokens are detected.

    Args:
        concepts: guideline tokens, one set or several.
        safety_text: CONDITIONING of what to guide away from.
        settings: the method's constants.
        mask: (N, h, w), where to look and act, the first one for all samples; None for everywhere.
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
        self.concepts, self.settings, self.mask, self.normalization = (
            tuple(concepts),
            settings,
            mask,
            normalization,
        )
        self.texts = {SAFETY: safety_text}
        self.rehearses = settings.look_first and settings.strength != 0
        self._background = max(concept.calibration.background for concept in concepts)

    def patch(self, model: ModelPatcher) -> None:
        width = attention_width(model)
        for concept in self.concepts:
            concept.check_fits(family(model), width)
        if self.settings.strength == 0:
            return

        def receive(run: Run) -> Any:
            state: DetectionState = run.state_of(self)
            state.guider = run.guider
            return None if state.decided else state.collector.receive

        listen(model, receive)

    def begin(self, context: RunContext) -> DetectionState:
        if len(context.latent_shape) != 4:
            raise ValueError(
                "Detect-and-Guide looks at single images, and this model samples video or audio. Remove the node."
            )
        mask = None
        if self.mask is not None:
            mask = F.interpolate(self.mask[:1, None].float(), size=context.latent_shape[-2:], mode="area")
        return DetectionState(MapCollector(self.concepts), mask)

    def is_active(self, level: NoiseLevel) -> bool:
        return self.settings.strength != 0 and level in self.settings.window

    def watch(self, step: Step, state: DetectionState) -> None:
        found = self._detect(step, state)
        if found is not None and step.is_new:
            state.seen.append(found)

    def region(self, state: DetectionState) -> Tensor | None:
        state.decided = True
        if not state.seen:
            return None
        state.map = torch.stack(state.seen).mean(0)
        # The mean over all steps tells objects apart, however much of the image is faintly above the edit threshold.
        settings = replace(self.settings, coverage=math.inf)
        found = regulate(state.map, settings, self._background)
        state.detection = regulate(state.map, settings, self._background, found.rows)
        rows = state.detection.rows
        return state.detection.scale > 0 if bool(rows.any()) else None

    def wanted_texts(self, step: Step, state: DetectionState) -> Mapping[str, Tensor]:
        if not state.decided:
            self._decide(step, state)
        if state.detection is None or not bool(state.detection.rows.any()):
            return {}
        names = (SAFETY, UNCOND, COND) if self.settings.host_mask == "SLD" else (SAFETY, UNCOND)
        return dict.fromkeys(names, state.detection.rows)

    def _decide(self, step: Step, state: DetectionState) -> None:
        """Where and how hard to guide at this step, from its own maps."""
        state.detection, state.map = None, self._detect(step, state)
        if state.map is None:
            return
        state.detection = regulate(state.map, self.settings, self._background, state.held)
        if step.is_new:
            state.held = state.detection.rows if state.held is None else state.held | state.detection.rows

    def _detect(self, step: Step, state: DetectionState) -> Tensor | None:
        """(B, 1, h, w) detection map of this step."""
        maps = None if state.guider is None else state.collector.take(state.guider.conds[COND], step)
        if maps is None:
            return None
        if self.settings.stacked:
            maps = self._stacked(maps, step, state)
        found = several_concepts([c.detection(m, self.normalization) for c, m in zip(self.concepts, maps)])
        return found if state.mask is None else found * state.mask.to(found)

    def _stacked(self, maps: list[Tensor], step: Step, state: DetectionState) -> list[Tensor]:
        total = maps if state.total is None else [a + b for a, b in zip(state.total, maps)]
        count = state.count + 1
        if step.is_new:
            state.total, state.count = total, count
        return [t / count for t in total]

    def correct(self, step: Step, state: DetectionState) -> Change | None:
        detection = state.detection
        if detection is None or state.map is None or not bool(detection.rows.any()):
            return None
        if SAFETY not in step.predictions or UNCOND not in step.predictions:
            if not state.warned:
                log.warning(
                    "Detect-and-Guide needs a negative conditioning, and this guider has none. Use a guider with CFG."
                )
            state.warned = True
            return None
        uncond, safety = (step.predictions[name].float() for name in (UNCOND, SAFETY))
        cond = step.predictions.get(COND, uncond).float()
        delta = guidance_term(
            uncond, cond, safety, detection.scale, step.sigma, step.cond_scale, self.settings
        )
        if self.settings.bounded:
            delta = bounded(delta, step.denoised.float())
        area = (detection.scale > 0).flatten(1).float().mean(1)
        return Change(
            delta,
            detection.rows,
            gate=torch.where(detection.rows, state.map.flatten(1).amax(1), 0.0),
            area=area,
        )
