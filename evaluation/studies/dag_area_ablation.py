"""Detect-and-Guide without its AreaScaler, as a correction. The host must be importable."""

from __future__ import annotations

from torch import Tensor

from ...guidance.detect_and_guide.regulation import Detection
from ...guidance.detect_and_guide.settings import DetectAndGuideSettings
from ...nodes.host.methods.detect_and_guide import DetectAndGuideCorrection
from .dag_variants import without_area_scaler


class WithoutAreaScaler(DetectAndGuideCorrection):
    """The method with the same scale at every edited position."""

    def regulate(self, found: Tensor, settings: DetectAndGuideSettings, held: Tensor | None) -> Detection:
        detection = super().regulate(found, settings, held)
        return without_area_scaler(detection, found, settings, self.background)
