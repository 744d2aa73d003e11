"""Calibrated mode for a style: the prediction keeps its content and loses the style's texture.

Where the prediction is drawn in the unwanted style, it is moved to the safe part's posterior mean, the
paper's E_w = (1 - w) E_data + w E_safe. E_data is the unconditional prediction there, as in the paper's Eq.
8, without the guidance: the prompt may ask for the style, and guidance would draw it again at every step.
E_safe is that prediction without its texture. Below the noise level at which the layout is fixed, shapes and
colours are in x and survive the loss of guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.composition import capped, per_sample
from .interface import Comparison, MoveReferences, Predictions
from .settings import SafeDenoiserResult, SafeDenoiserSettings
from .style_posterior import WINDOW, StyleLibrary, style_log_odds, without_style


@dataclass(frozen=True)
class StyledArea:
    """The area (B, 1, h, w) in [0, 1] where a run has found the style.

    It stays, for the prompt keeps asking for the style.
    """

    area: Tensor

    @classmethod
    def none(cls, like: Tensor) -> StyledArea:
        """Return the state before the style is found, for a batch like (B, C, h, w)."""
        return cls(torch.zeros_like(like[:, :1]))


def style_correction(
    denoised: Tensor,
    unconditional: Tensor,
    library: StyleLibrary,
    settings: SafeDenoiserSettings,
    before: StyledArea,
    mask: Tensor | None = None,
) -> tuple[SafeDenoiserResult, StyledArea]:
    """Replace the parts that are drawn in the style by their content.

    Args:
        denoised: (B, C, h, w) float32 or wider, the guided prediction.
        unconditional: the prediction without the prompt; `denoised` again when there is none.
        library: statistics of the style and of neutral images.
        settings: strength is w, 1 replaces entirely. An image counts as drawn in the style when its largest
            log-odds exceed those of the neutral images by `threshold` times the lead that the style's own
            images have.
        before: where earlier steps found the style.
        mask: (1 or B, 1, h, w) in [0, 1], where to search and to act.

    Returns:
        The correction, and the area found up to now.
    """
    odds = style_log_odds(denoised, library)
    score = (odds if mask is None else odds.where(mask >= 0.5, -torch.inf)).flatten(1).amax(1)
    lead = library.typical - library.neutral_highest
    threshold = (library.neutral_highest + settings.threshold * lead).expand_as(score)
    found = _area(odds, library) * per_sample((score > threshold).to(odds.dtype), odds)
    now = StyledArea(torch.maximum(before.area, found))
    acting = now.area if mask is None else now.area * mask.to(now.area.dtype)
    gate = (acting.flatten(1).amax(1) > 0).to(denoised.dtype)
    if not bool((gate > 0).any()):
        return SafeDenoiserResult(torch.zeros_like(denoised), gate, score, threshold), now
    textured = _area(style_log_odds(unconditional, library), library)
    safe = unconditional + textured * (without_style(unconditional, library) - unconditional)
    delta = capped(settings.strength * acting * (safe - denoised), denoised, settings.cap)
    return SafeDenoiserResult(delta, gate, score, threshold), now


def _area(odds: Tensor, library: StyleLibrary) -> Tensor:
    """Return where log-odds (B, 1, h, w) exceed those of most neutral images, widened, with a soft rim."""
    span = (library.neutral_highest - library.neutral_median).clamp_min(1e-6)
    ramp = ((odds - library.neutral_median) / span).clamp(0, 1)
    return F.avg_pool2d(F.max_pool2d(ramp, WINDOW, 1, WINDOW // 2), 3, 1, 1, count_include_pad=False)


class StyleComparison(Comparison):
    """Comparison of a prediction's texture with that of a style.

    Its state is the area where the style was found.
    """

    def __init__(self, library: StyleLibrary, settings: SafeDenoiserSettings) -> None:
        self.settings = settings
        self._stored = library
        self._library = library
        self._found: StyledArea | None = None

    def place(self, device: torch.device, move: MoveReferences, mask: Tensor | None) -> None:
        self._library = self._stored.to(device)

    def correct(self, predictions: Predictions) -> SafeDenoiserResult:
        denoised = predictions.denoised
        before = StyledArea.none(denoised) if self._found is None else self._found
        result, found = style_correction(
            denoised, predictions.unconditional, self._library, self.settings, before, predictions.mask
        )
        if predictions.is_new:
            self._found = found
        return result

    def for_another_run(self) -> Comparison:
        return StyleComparison(self._stored, self.settings)

    def unconditional_rows(self, every_row: Tensor) -> Tensor | None:
        if self._found is not None:
            return self._found.area.flatten(1).amax(1) > 0
        return every_row if self.settings.anchor == "unconditional" else None

    def resume_data(self) -> StyledArea | None:
        return self._found

    def resume(self, data: StyledArea) -> None:
        self._found = data
