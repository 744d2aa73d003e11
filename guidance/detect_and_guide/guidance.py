"""Self-regulated guidance away from a detected concept.

It acts only at the concept's position. Its scale follows from the size and the certainty of the detection.

Li et al., Detect-and-Guide (CVPR 2025), section 4.2. The guidance term is that of the paper's Table 1, whose
weights of the three predictions sum to 1; Eq. 4 as printed drops a term. The MagnitudeScaler is clamp(., 1,
5) as the text says; Eq. 5 prints the maximum instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.composition import per_sample
from ..core.noise_level import SigmaWindow

HostMask = Literal["SEGA", "SLD"]
Fill = Literal["nearest", "blur"]

WARM_UP = 7.56
"""Sigma of step 5 of 50, at which the paper starts to guide."""

EDIT_THRESHOLD = 0.01
"""The paper's tau_lo."""

BLUR_STD = 2.0
"""Standard deviation of the "blur" fill in latent pixels."""


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
        scale_by_area: False leaves the AreaScaler out: every edited position gets the scale of the whole
            image.
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
    scale_by_area: bool = True
    cap: float = 10.0
    host_mask: HostMask = "SEGA"
    quantile: float = 0.9
    sld_threshold: float = 0.025
    connectivity: int = 8
    fill: Fill = "nearest"
    stacked: bool = False
    look_first: bool = False


@dataclass(frozen=True)
class Detection:
    """Result of evaluating the detection maps of a batch.

    Attributes:
        scale: (B, 1, h, w), S of the paper times the edit mask; zero for samples without a detection.
        edit: (B, 1, h, w) bool, positions that may be changed.
        detected: (B,) bool, samples with a position above tau_hi.
        ambiguous: (B,) bool, samples covered so much that no object is distinct yet.
    """

    scale: Tensor
    edit: Tensor
    detected: Tensor
    ambiguous: Tensor

    @property
    def rows(self) -> Tensor:
        """Return (B,) bool, the samples to guide."""
        return self.detected & ~self.ambiguous


def label_objects(mask: Tensor, connectivity: int = 8) -> Tensor:
    """Label the connected components of a mask.

    Args:
        mask: (B, h, w) bool.
        connectivity: 8 or 4 neighbours.

    Returns:
        (B, h, w) int64: 0 outside the mask, and a number for every object that no other object of the sample
        has.
    """
    height, width = mask.shape[-2:]
    # The largest index of an object spreads through it. float32 counts exactly up to 2^24 positions.
    indices = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float32)
    seeds = indices.view(1, height, width)
    inside = mask.float()
    labels = seeds * inside
    while True:
        spread = _largest_neighbour(labels, connectivity) * inside
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _largest_neighbour(labels: Tensor, connectivity: int) -> Tensor:
    """Return the largest value (B, h, w) among every position and its 8 or 4 neighbours."""
    if connectivity == 8:
        return F.max_pool2d(labels, 3, stride=1, padding=1)
    horizontal = F.max_pool2d(labels, (1, 3), stride=1, padding=(0, 1))
    vertical = F.max_pool2d(labels, (3, 1), stride=1, padding=(1, 0))
    return torch.maximum(horizontal, vertical)


def object_shares(mask: Tensor, connectivity: int = 8) -> Tensor:
    """Return the share of the image that the object at every position covers; 0 outside objects.

    Args:
        mask: (B, h, w) bool.
        connectivity: 8 or 4 neighbours.

    Returns:
        (B, h, w) float32.
    """
    labels = label_objects(mask, connectivity).flatten(1)  # (B, h w)
    positions = labels.shape[1]
    ones = torch.ones_like(labels, dtype=torch.float32)
    counts = torch.zeros(len(labels), positions + 1, device=mask.device).scatter_add_(1, labels, ones)
    return (counts.gather(1, labels) / positions).view(mask.shape) * mask


def fill_nearest(values: Tensor, known: Tensor) -> Tensor:
    """Give every position the value of the nearest known position.

    Of equally near ones, the first in reading order counts.

    Args:
        values: (B, h, w).
        known: (B, h, w) bool. A sample without any keeps its values.
    """
    return torch.stack([_fill_one(v, k) for v, k in zip(values, known)])


def _fill_one(values: Tensor, known: Tensor) -> Tensor:
    """Fill one sample (h, w)."""
    # The nearest known position of a position outside always lies on the border of the known ones.
    surrounded = -F.max_pool2d(-known[None].float(), 3, stride=1, padding=1)[0] > 0
    border = (known & ~surrounded).nonzero()  # (n, 2)
    outside = (~known).nonzero()  # (m, 2)
    if len(border) == 0 or len(outside) == 0:
        return values
    filled = values.clone()
    for part in outside.split(4096):
        offset = part[:, None] - border[None]  # (part, n, 2)
        nearest = border[(offset**2).sum(-1).argmin(1)]  # (part, 2)
        filled[part[:, 0], part[:, 1]] = values[nearest[:, 0], nearest[:, 1]]
    return filled


def fill_blurred(values: Tensor, known: Tensor, std: float = BLUR_STD) -> Tensor:
    """Return the Gaussian-weighted mean of the known values around every position; zero far from all of them.

    Args:
        values: (B, h, w).
        known: (B, h, w) bool.
        std: standard deviation in positions.
    """
    radius = round(3 * std)
    offsets = torch.arange(-radius, radius + 1, device=values.device, dtype=values.dtype)
    kernel = torch.exp(-0.5 * (offsets / std) ** 2)

    def blurred(x: Tensor) -> Tensor:
        horizontally = F.conv2d(x[:, None], kernel.view(1, 1, 1, -1), padding=(0, radius))
        return F.conv2d(horizontally, kernel.view(1, 1, -1, 1), padding=(radius, 0))[:, 0]

    weights = blurred(known.to(values.dtype))
    mean = blurred(values * known) / weights.clamp_min(1e-6)
    return torch.where(weights > 1e-6, mean, torch.zeros_like(values))


def within_reach(mask: Tensor, reach: float) -> Tensor:
    """Dilate a mask (B, h, w) bool by `reach` times the longer side, in rows and in columns."""
    radius = max(1, round(reach * max(mask.shape[-2:])))
    return F.max_pool2d(mask.float(), 2 * radius + 1, stride=1, padding=radius) > 0


def area_scale(detection: Tensor, edit: Tensor, unsafe: Tensor, settings: DetectAndGuideSettings) -> Tensor:
    """Return the AreaScaler: every object gets `base` times the share of the image that it covers.

    The positions of the edit mask around an object get the object's value too.

    Args:
        detection: (B, h, w) detection map.
        edit: (B, h, w) bool.
        unsafe: (B, h, w) bool, the detected positions.

    Returns:
        (B, h, w); zero for samples in which nothing is detected.
    """
    if not settings.scale_by_area:
        return (edit & unsafe.flatten(1).any(1)[:, None, None]).to(detection.dtype) * settings.base
    objects = settings.base * object_shares(unsafe, settings.connectivity).to(detection.dtype)
    filled = fill_nearest(objects, unsafe) if settings.fill == "nearest" else fill_blurred(objects, unsafe)
    return torch.maximum(objects, filled * edit)


def magnitude_scale(detection: Tensor, edit_threshold: float, largest: float = 5.0) -> Tensor:
    """Return the MagnitudeScaler of the paper's Eq.

    5. It is the detection in units of the edit threshold, clamped to [1, `largest`].

    It is 0 where the detection is below the threshold.
    """
    certainty = (detection / edit_threshold).clamp(1, max(1.0, largest))
    return torch.where(detection >= edit_threshold, certainty, torch.zeros_like(detection))


def regulate(
    detection: Tensor, settings: DetectAndGuideSettings, background: float = 0.0, held: Tensor | None = None
) -> Detection:
    """Decide where and how strongly to guide.

    Args:
        detection: (B, 1, h, w) detection maps in [0, 1].
        settings: the method's constants.
        background: the maps' noise where the concept is not.
        held: (B,) bool, samples in which the concept was detected before.
    """
    edit_threshold = settings.edit_threshold or max(EDIT_THRESHOLD, background)
    maps = detection[:, 0]
    edit = maps >= edit_threshold
    ambiguous = edit.flatten(1).float().mean(1) >= settings.coverage
    threshold = torch.full((len(maps), 1, 1), settings.detection_threshold, device=maps.device)
    if held is not None:
        threshold[held] = min(settings.hold_threshold, settings.detection_threshold)
    unsafe = maps >= threshold
    detected = unsafe.flatten(1).any(1)
    if settings.core > 0:
        unsafe |= (maps >= settings.core * maps.amax((1, 2), keepdim=True)) & detected[:, None, None]
    if settings.reach > 0:
        edit = edit & within_reach(unsafe, settings.reach)
    scale = area_scale(maps, edit, unsafe, settings) * magnitude_scale(
        maps, edit_threshold, settings.magnitude
    )
    scale = (settings.strength * scale).clamp(max=settings.cap) * edit
    scale = torch.where(per_sample(detected & ~ambiguous, scale), scale, torch.zeros_like(scale))
    return Detection(scale[:, None], edit[:, None], detected, ambiguous)


def host_mask(
    uncond: Tensor, cond: Tensor, safety: Tensor, sigma: float, settings: DetectAndGuideSettings
) -> Tensor:
    """Return the positions and channels (B, C, h, w) bool that SEGA or SLD would change.

    SEGA selects the largest differences of every channel, before any scaling (otherwise the zeros outside the
    objects would decide). SLD selects where the prompt's direction exceeds the safety text's by less than its
    threshold.

    Args:
        uncond, cond, safety: (B, C, h, w) denoised predictions.
        sigma: the sampler's noise level, which turns differences of predictions into differences of
            directions.
        settings: the rule and its threshold.
    """
    if settings.host_mask == "SLD":
        return (safety - cond) / sigma < settings.sld_threshold
    difference = (safety - uncond).abs().float()
    return difference >= difference.flatten(2).quantile(settings.quantile, dim=2)[..., None, None]


def guidance_term(
    uncond: Tensor,
    cond: Tensor,
    safety: Tensor,
    scale: Tensor,
    sigma: float,
    cond_scale: float,
    settings: DetectAndGuideSettings,
) -> Tensor:
    """Return the change of the guided prediction: cond_scale * scale * mask * (uncond - safety).

    In the paper's terms, eps_u + w [(eps_p - eps_u) - S M (eps_s - eps_u)]; see the module's docstring.

    Args:
        uncond, cond, safety: (B, C, h, w) denoised predictions.
        scale: (B, 1, h, w) from `regulate`.
        sigma: the sampler's noise level.
        cond_scale: the CFG scale.
    """
    mask = host_mask(uncond, cond, safety, sigma, settings)
    return cond_scale * scale * mask * (uncond - safety)


def bounded(delta: Tensor, denoised: Tensor) -> Tensor:
    """Return `delta`, cut so that every channel of `denoised` stays in its range; both (B, C, h, w)."""
    low, high = denoised.amin((2, 3), keepdim=True), denoised.amax((2, 3), keepdim=True)
    return (denoised + delta).clamp(low, high) - denoised
