"""Self-regulated guidance away from a detected concept: only where it is, as hard as its size and certainty ask for.

Kim et al., Detect-and-Guide (CVPR 2025), section 4.2. The guidance term is that of the paper's Table 1, whose weights of the
three predictions sum to 1; Eq. 4 as printed drops a term. MagnitudeScaler is clamp(., 1, 5) as the text says, where Eq. 5
prints the maximum.
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
"""Sigma of step 5 of 50, with which the paper begins."""

EDIT_THRESHOLD = 0.01
"""The paper's tau_lo."""

BLUR_STD = 2.0
"""Width of the "blur" fill in latent pixels."""


@dataclass(frozen=True)
class DetectAndGuideSettings:
    """Constants of the method; the defaults are the paper's.

    Attributes:
        strength: multiplies the guidance; 0 is off.
        window: noise levels at which the method acts.
        edit_threshold: tau_lo, detection above which a position may be changed; 0 for the paper's, or the tokens' background
            noise where that is higher.
        detection_threshold: tau_hi, detection that counts as the concept.
        hold_threshold: the same for a sample in which the concept was detected before in the run: as guidance removes a thing,
            its detection fades before the thing is gone. The paper has no such memory, and neither has the default.
        core: share of a detected sample's highest value from which a position belongs to the concept too, below tau_hi; 0, the
            paper's, for none. The threshold that tells images apart is far above the one that tells positions apart.
        reach: how far around the concept's positions changes may go, as a share of the image's longer side; 0, the paper's, for
            anywhere above tau_lo, other things that are faintly detected included.
        bounded: keep every channel of the corrected prediction within the values that it had. The paper does not, and a scale that
            removes then leaves the values that the model knows, which disturbs the whole image.
        coverage: share of positions above tau_lo from which on the image has no object yet, and nothing is done.
        base: scale per share of the image that an object covers.
        magnitude: largest factor for certainty; 1 leaves the MagnitudeScaler out.
        scale_by_area: False gives every edited position the scale of the whole image, leaving the AreaScaler out.
        cap: largest scale.
        host_mask: rule that picks the positions and channels to change inside the edit mask.
        quantile: SEGA: share of positions left alone in every channel.
        sld_threshold: SLD's lambda; the paper combines with SLD-Strong's.
        connectivity: 8 or 4 neighbours make an object.
        fill: how the scale of an object reaches the positions around it that may be changed too.
        stacked: average the maps of a run's steps instead of using each step's own.
        look_first: sample twice: without guidance to average the maps of all steps, which tells images and places apart better
            than any step's own, then with it, keeping everything else as it was in the first. The paper samples once.
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
    """What the maps of a batch say.

    Attributes:
        scale: (B, 1, h, w), S of the paper times the edit mask; zero for samples without a detection.
        edit: (B, 1, h, w) bool, where changes may happen.
        detected: (B,) bool, samples with a position above tau_hi.
        ambiguous: (B,) bool, samples so covered that no object is told apart yet.
    """

    scale: Tensor
    edit: Tensor
    detected: Tensor
    ambiguous: Tensor

    @property
    def rows(self) -> Tensor:
        """(B,) bool, samples to guide."""
        return self.detected & ~self.ambiguous


def label_objects(mask: Tensor, connectivity: int = 8) -> Tensor:
    """Connected components: (B, h, w) bool -> (B, h, w) int64, 0 outside, one number of its own for every object of a sample."""
    height, width = mask.shape[-2:]
    # The largest index of an object spreads through it; float32 counts exactly up to 2^24 positions.
    seeds = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float32).view(
        1, height, width
    )
    inside = mask.float()
    labels = seeds * inside
    while True:
        spread = _largest_neighbour(labels, connectivity) * inside
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _largest_neighbour(labels: Tensor, connectivity: int) -> Tensor:
    if connectivity == 8:
        return F.max_pool2d(labels, 3, stride=1, padding=1)
    rows = F.max_pool2d(labels, (1, 3), stride=1, padding=(0, 1))
    return torch.maximum(rows, F.max_pool2d(labels, (3, 1), stride=1, padding=(1, 0)))


def object_shares(mask: Tensor, connectivity: int = 8) -> Tensor:
    """For every position of an object the share of the image that the object covers, 0 elsewhere: (B, h, w) float32."""
    labels = label_objects(mask, connectivity).flatten(1)
    positions = labels.shape[1]
    ones = torch.ones_like(labels, dtype=torch.float32)
    counts = torch.zeros(len(labels), positions + 1, device=mask.device).scatter_add_(1, labels, ones)
    return (counts.gather(1, labels) / positions).view(mask.shape) * mask


def fill_nearest(values: Tensor, known: Tensor) -> Tensor:
    """Give every position the value of the nearest known one, by Euclidean distance; ties go to the first in reading order.

    Args:
        values: (B, h, w).
        known: (B, h, w) bool. A sample without any keeps its values.
    """
    return torch.stack([_fill_one(v, k) for v, k in zip(values, known)])


def _fill_one(values: Tensor, known: Tensor) -> Tensor:
    # What is nearest to a position outside lies on the border of the known ones.
    surrounded = -F.max_pool2d(-known[None].float(), 3, stride=1, padding=1)[0] > 0
    border = (known & ~surrounded).nonzero()
    outside = (~known).nonzero()
    if len(border) == 0 or len(outside) == 0:
        return values
    filled = values.clone()
    for part in outside.split(4096):
        distance = (part[:, None, 0] - border[None, :, 0]) ** 2 + (part[:, None, 1] - border[None, :, 1]) ** 2
        nearest = border[distance.argmin(1)]
        filled[part[:, 0], part[:, 1]] = values[nearest[:, 0], nearest[:, 1]]
    return filled


def fill_blurred(values: Tensor, known: Tensor, std: float = BLUR_STD) -> Tensor:
    """Gaussian average of the known values around every position; positions far from any of them get zero."""
    radius = round(3 * std)
    offsets = torch.arange(-radius, radius + 1, device=values.device, dtype=values.dtype)
    kernel = torch.exp(-0.5 * (offsets / std) ** 2)

    def blurred(x: Tensor) -> Tensor:
        rows = F.conv2d(x[:, None], kernel.view(1, 1, 1, -1), padding=(0, radius))
        return F.conv2d(rows, kernel.view(1, 1, -1, 1), padding=(radius, 0))[:, 0]

    weights = blurred(known.to(values.dtype))
    return torch.where(
        weights > 1e-6, blurred(values * known) / weights.clamp_min(1e-6), torch.zeros_like(values)
    )


def within_reach(mask: Tensor, reach: float) -> Tensor:
    """Positions at most `reach` of the longer side away from the mask, rows and columns alike: (B, h, w) bool."""
    radius = max(1, round(reach * max(mask.shape[-2:])))
    return F.max_pool2d(mask.float(), 2 * radius + 1, stride=1, padding=radius) > 0


def area_scale(detection: Tensor, edit: Tensor, unsafe: Tensor, settings: DetectAndGuideSettings) -> Tensor:
    """AreaScaler: every object gets `base` times the share of the image that it covers, and hands it on to the edit mask around it.

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
    """MagnitudeScaler: certainty in units of the edit threshold, between 1 and `largest`; 0 below the threshold. Paper Eq. 5."""
    return torch.where(
        detection >= edit_threshold,
        (detection / edit_threshold).clamp(1, max(1.0, largest)),
        torch.zeros_like(detection),
    )


def regulate(
    detection: Tensor, settings: DetectAndGuideSettings, background: float = 0.0, held: Tensor | None = None
) -> Detection:
    """Where and how hard to guide.

    Args:
        detection: (B, 1, h, w) detection maps in [0, 1].
        settings: the method's constants.
        background: the maps' noise where nothing is.
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
    """Positions and channels that SEGA or SLD would change: (B, C, h, w) bool, from denoised predictions.

    SEGA keeps the largest differences of every channel, before any scaling (else the zeros outside the objects would decide).
    SLD keeps where the prompt's direction exceeds the safety text's by less than its threshold, in units of unit noise.
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
    """What is added to the guided prediction: cond_scale * scale * mask * (uncond - safety), all of them denoised predictions.

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
    """The change cut off where a channel of the prediction would leave the values that it has: both (B, C, h, w)."""
    low, high = denoised.amin((2, 3), keepdim=True), denoised.amax((2, 3), keepdim=True)
    return (denoised + delta).clamp(low, high) - denoised
