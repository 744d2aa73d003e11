"""Safe Denoiser for a thing that may stand anywhere: both posteriors of the theory, over windows at every position.

Where a window is more likely the unwanted thing than anything else in the negation images, the prediction there is moved
to the safe part's posterior mean. That is the paper's E_w = (1 - w) E_data + w E_safe in the form that stays finite where
P(unwanted) comes near 1: E_data + beta (E_data - E_unsafe) is 0 times infinity there, and subtracting a shape from a
prediction whose prompt asks for it bends the shape instead of replacing it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.composition import capped
from ..core.noise_level import NoiseLevel
from .patch_posterior import PatchLibrary, cut, log_odds
from .whole_image import SafeDenoiserResult, SafeDenoiserSettings

MOST_PLACES = 4
"""Places that are acted on in one step of an image; further ones wait for the next step."""

LATEST_DECISION = 1.0
"""Noise level (sigma_VE) below which nothing new is decided: the layout stands by then, and looking on would find little but
false alarms. What is decided stays in force until the window ends."""

REGION_GAIN = 1.3
"""The expected shape is an average and soft at its rim: with this gain its body is replaced entirely."""


@dataclass(frozen=True)
class Replacement:
    """What a run has decided: safe content (B, C, h, w), and where it belongs, area (B, 1, h, w) in [0, 1].

    It stays for the rest of the run. The prompt keeps asking for the thing, so one look that comes out clean would bring it
    back; and a different choice at every step would add up to no image at all.
    """

    content: Tensor
    area: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Replacement:
        """Nothing decided yet, for a batch like (B, C, h, w)."""
        return cls(torch.zeros_like(like), torch.zeros_like(like[:, :1]))


def local_correction(
    denoised: Tensor,
    library: PatchLibrary,
    settings: SafeDenoiserSettings,
    before: Replacement,
    level: NoiseLevel,
    mask: Tensor | None = None,
) -> tuple[SafeDenoiserResult, Replacement]:
    """Replace the unwanted thing in the prediction by what the safe part would have there.

    Args:
        denoised: (B, C, h, w) float32 or wider.
        library: windows of the negation images.
        settings: strength is w, 1 replaces entirely; a place counts from log-odds of `threshold` times the set's own.
        before: what earlier steps decided.
        level: the step's noise level; late ones decide nothing new.
        mask: (1 or B, 1, h, w) in [0, 1], where to look and to act.

    Returns:
        The correction, and what is decided now.
    """
    threshold = (settings.threshold * library.typical).clamp_min(1e-6).expand(len(denoised))
    score = torch.full_like(threshold, math.nan)
    decided = before
    if level.sigma >= LATEST_DECISION:
        odds, components = log_odds(denoised, library, mask)
        score = odds.flatten(1).amax(1)
        decided = Replacement(before.content.clone(), before.area.clone())
        for i in (score > threshold).nonzero()[:, 0].tolist():
            _decide(
                denoised[i],
                odds[i],
                components[i],
                library,
                threshold[i],
                decided.content[i],
                decided.area[i],
            )
    acting = decided.area if mask is None else decided.area * mask.to(decided.area.dtype)
    delta = capped(settings.strength * acting * (decided.content - denoised), denoised, settings.cap)
    return SafeDenoiserResult(
        delta, (acting.flatten(1).amax(1) > 0).to(delta.dtype), score, threshold
    ), decided


def _decide(
    x: Tensor,
    odds: Tensor,
    components: Tensor,
    library: PatchLibrary,
    threshold: Tensor,
    content: Tensor,
    area: Tensor,
) -> None:
    """Find the places in one image (C, h, w), best first, and write what belongs there into `content` and `area`."""
    odds, near = odds.clone(), library.window // 2
    for _ in range(MOST_PLACES):
        best = int(odds.argmax())
        place = torch.tensor([best // odds.shape[1], best % odds.shape[1]])
        if odds[place[0], place[1]] <= threshold:
            return
        odds[
            max(0, place[0] - near) : place[0] + near + 1, max(0, place[1] - near) : place[1] + near + 1
        ] = -math.inf
        middle = (place * library.factor + library.factor // 2).tolist()
        if area[0, middle[0], middle[1]] <= 0.5:
            _replace_at(x, place, _expected_region(components[best], library), library, content, area)


def _expected_region(component: Tensor, library: PatchLibrary) -> Tensor:
    """Posterior mean of the thing's shape in a window, (s, s), with a soft rim."""
    distance = (component - library.unwanted).square().sum(1)
    shape = torch.einsum("n,nij->ij", torch.softmax(-distance / library.bandwidth, 0), library.regions)
    return (
        REGION_GAIN * F.avg_pool2d(shape[None, None], 2 * library.factor + 1, 1, library.factor)[0, 0]
    ).clamp(0, 1)


def _replace_at(
    x: Tensor, place: Tensor, shape: Tensor, library: PatchLibrary, content: Tensor, area: Tensor
) -> None:
    pad = library.window // 2 * library.factor
    found = _nearest_safe(x, place, library)
    top, left = (int(p) * library.factor - pad for p in place)
    rows, columns = (
        slice(max(0, start), min(size, start + len(shape))) for start, size in zip((top, left), x.shape[-2:])
    )
    inside = (
        slice(None),
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, columns.stop - left),
    )
    new = shape[None][inside] > area[:, rows, columns]
    content[:, rows, columns] = torch.where(new, found[inside], content[:, rows, columns])
    area[:, rows, columns] = torch.where(new, shape[None][inside], area[:, rows, columns])


def _nearest_safe(x: Tensor, place: Tensor, library: PatchLibrary) -> Tensor:
    """The safe window most like the one at `place`, at full resolution: (C, s, s).

    The posterior mean over safe windows: in as many dimensions as a window has, its softmax puts all weight on the nearest
    one. Mixtures of several would be no image, and leave it to the prompt what to make of them.
    """
    window, factor = library.window, library.factor
    half = window // 2
    small = F.avg_pool2d(x[None], factor)
    own = cut(F.pad(small, (half,) * 4, mode="replicate")[0], place, window, 1)
    seen = cut(F.pad(torch.ones_like(small[0, :1]), (half,) * 4), place, window, 1)
    others = F.pad(F.avg_pool2d(library.latents, factor), (half,) * 4, mode="replicate")
    squares = F.conv2d(others.square().sum(1, keepdim=True), seen[None])[:, 0]
    distance = squares - 2 * F.conv2d(others, (own * seen)[None])[:, 0]
    best = int(distance.masked_fill(~library.outside, math.inf).argmin())
    image, position = divmod(best, library.outside[0].numel())
    there = torch.tensor(divmod(position, library.outside.shape[-1]))
    return cut(
        F.pad(library.latents[image][None], (half * factor,) * 4, mode="replicate")[0], there, window, factor
    )
