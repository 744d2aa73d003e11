"""Safe Denoiser for a style: the prediction keeps its content, and loses the texture that a few images share.

Where the prediction is drawn in the unwanted style it is moved to the safe part's posterior mean, the paper's
E_w = (1 - w) E_data + w E_safe. E_data is the unconditional prediction there, as in the paper's Eq. 8, without the guidance: the
prompt may ask for the style, and guidance would paint it again at every step. E_safe is that prediction less its texture.
Below a noise level at which the layout stands, shapes and colours are in x and survive the loss of guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.composition import capped
from .style_posterior import WINDOW, StyleLibrary, log_odds, without_style
from .whole_image import SafeDenoiserResult, SafeDenoiserSettings


@dataclass(frozen=True)
class StyledArea:
    """What a run has found so far: where the style is, (B, 1, h, w) in [0, 1]. It stays, for the prompt keeps asking for it."""

    area: Tensor

    @classmethod
    def none(cls, like: Tensor) -> StyledArea:
        """Nothing found yet, for a batch like (B, C, h, w)."""
        return cls(torch.zeros_like(like[:, :1]))


def style_correction(
    denoised: Tensor,
    unconditional: Tensor,
    library: StyleLibrary,
    settings: SafeDenoiserSettings,
    before: StyledArea,
    mask: Tensor | None = None,
) -> tuple[SafeDenoiserResult, StyledArea]:
    """Replace what is drawn in the style by its content.

    Args:
        denoised: (B, C, h, w) float32 or wider, what the image will be.
        unconditional: the same without the prompt; `denoised` again when there is no such prediction.
        library: the style, and what is fine.
        settings: strength is w, 1 replaces entirely. An image counts as drawn in the style when its largest log-odds exceed those of
            the fine images by `threshold` times the lead that the style's own images have.
        before: where earlier steps found it.
        mask: (1 or B, 1, h, w) in [0, 1], where to look and to act.

    Returns:
        The correction, and where the style is now.
    """
    odds = log_odds(denoised, library)
    score = (odds if mask is None else odds.where(mask >= 0.5, -torch.inf)).flatten(1).amax(1)
    threshold = (library.highest + settings.threshold * (library.typical - library.highest)).expand_as(score)
    found = _area(odds, library) * (score > threshold).to(odds.dtype)[:, None, None, None]
    now = StyledArea(torch.maximum(before.area, found))
    acting = now.area if mask is None else now.area * mask.to(now.area.dtype)
    gate = (acting.flatten(1).amax(1) > 0).to(denoised.dtype)
    if not bool((gate > 0).any()):
        return SafeDenoiserResult(torch.zeros_like(denoised), gate, score, threshold), now
    still = _area(log_odds(unconditional, library), library)
    safe = unconditional + still * (without_style(unconditional, library) - unconditional)
    delta = capped(settings.strength * acting * (safe - denoised), denoised, settings.cap)
    return SafeDenoiserResult(delta, gate, score, threshold), now


def _area(odds: Tensor, library: StyleLibrary) -> Tensor:
    """Where windows have higher log-odds than those of fine images usually reach, and their surroundings, with a soft rim."""
    ramp = ((odds - library.usual) / (library.highest - library.usual).clamp_min(1e-6)).clamp(0, 1)
    return F.avg_pool2d(F.max_pool2d(ramp, WINDOW, 1, WINDOW // 2), 3, 1, 1, count_include_pad=False)
