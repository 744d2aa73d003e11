"""Constants of Detect-and-Guide.

Li et al., Detect-and-Guide (CVPR 2025), section 3.2 and the supplement. The defaults are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..core.noise_level import SigmaWindow

HostMask = Literal["SEGA", "SLD"]
Fill = Literal["nearest", "blur"]

WARM_UP = 7.56
"""Sigma of step 5 of 50, at which the paper starts to guide."""


@dataclass(frozen=True)
class DetectAndGuideSettings:
    """Constants of the method; the defaults are the paper's.

    Attributes:
        strength: factor of the guidance; 0 is off.
        window: noise levels at which the method acts.
        edit_threshold: tau_lo, detection from which a position may be changed. 0 takes the larger of the
            paper's value and the tokens' background noise.
        detection_threshold: tau_hi, detection from which a position counts as the concept.
        hold_threshold: tau_hi for a sample in which the concept was detected before in the run: as guidance
            removes a subject, its detection fades before the subject is gone. With the default, as in the
            paper, there is no such memory.
        core: below tau_hi, a position of a detected sample also counts as the concept from this share of the
            sample's highest value. 0, the paper's, adds no positions. The threshold that separates images is
            far above the one that separates positions.
        reach: largest distance of a changed position from the concept's positions, as a share of the image's
            longer side. 0, the paper's, allows all positions above tau_lo, including faintly detected parts
            of other subjects.
        bounded: keep every channel of the corrected prediction within the range of values that it had. The
            paper does not; a scale large enough to remove a subject then leaves the range that the model
            knows and disturbs the whole image.
        coverage: from this share of positions above tau_lo, the image has no distinct object yet and nothing
            is changed.
        base: scale per share of the image that an object covers.
        magnitude: largest factor for certainty; 1 leaves the MagnitudeScaler out.
        cap: largest scale.
        host_mask: rule that selects the positions and channels to change inside the edit mask.
        quantile: for "SEGA", the share of positions that stay unchanged in every channel.
        sld_threshold: for "SLD", its lambda; the paper combines with SLD-Strong's.
        connectivity: number of neighbours, 8 or 4, through which positions belong to one object.
        fill: how an object's scale extends to the positions around it that may be changed too.
        stacked: use the mean of the maps of all steps so far instead of each step's own map.
        look_first: use two passes. The first samples without guidance and averages the maps of all steps,
            which separates images and positions better than any step's own map. The second guides, and keeps
            everything else as it was in the first. The paper has one pass.
    """

    strength: float = 1.0
    window: SigmaWindow = field(default_factory=lambda: SigmaWindow(high=WARM_UP))
    edit_threshold: float = 0.0
    detection_threshold: float = 0.5
    hold_threshold: float = 0.5
    core: float = 0.0
    reach: float = 0.0
    bounded: bool = False
    coverage: float = 0.8
    base: float = 5.0
    magnitude: float = 5.0
    cap: float = 10.0
    host_mask: HostMask = "SEGA"
    quantile: float = 0.9
    sld_threshold: float = 0.025
    connectivity: int = 8
    fill: Fill = "nearest"
    stacked: bool = False
    look_first: bool = False
