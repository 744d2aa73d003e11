"""Calibrated mode for a subject: both posteriors of the theory, for windows at every position.

Where a window is more likely the unwanted subject than anything else in the reference images, the prediction
is moved to the safe part's posterior mean. This is the paper's E_w = (1 - w) E_data + w E_safe, which stays
finite where P(unwanted) comes near 1. The form E_data + beta (E_data - E_unsafe) is undefined there (infinity
times 0). It would also bend a shape that the prompt asks for, instead of replacing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.composition import capped
from ..core.noise_level import NoiseLevel
from .edge_descriptors import cut_window
from .interface import Comparison, MoveReferences, Predictions
from .patch_posterior import PatchLibrary, patch_log_odds
from .settings import SafeDenoiserResult, SafeDenoiserSettings

MOST_POSITIONS = 4
"""Positions of an image that one step decides about; further ones wait for the next step."""

LATEST_DECISION = 1.0
"""Noise level (sigma_VE) below which no new positions are decided. The layout is fixed by then, and a longer
search finds mostly false alarms. Earlier decisions stay in force until the window ends."""

REGION_GAIN = 1.3
"""Gain of the expected shape. The shape is an average and soft at its rim; with this gain its body is
replaced entirely."""


@dataclass(frozen=True)
class Replacement:
    """The decisions of a run: safe content (B, C, h, w), and its area (B, 1, h, w) in [0, 1].

    They stay for the rest of the run. The prompt keeps asking for the subject, so one prediction without it
    would bring it back; and different content at every step would not add up to an image.
    """

    content: Tensor
    area: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Replacement:
        """Return the state before any decision, for a batch like (B, C, h, w)."""
        return cls(torch.zeros_like(like), torch.zeros_like(like[:, :1]))

    def copy(self) -> Replacement:
        """Return a copy that can be written to."""
        return Replacement(self.content.clone(), self.area.clone())


def local_correction(
    denoised: Tensor,
    library: PatchLibrary,
    settings: SafeDenoiserSettings,
    before: Replacement,
    level: NoiseLevel,
    mask: Tensor | None = None,
) -> tuple[SafeDenoiserResult, Replacement]:
    """Replace the unwanted subject in the prediction by content of the safe part.

    Args:
        denoised: (B, C, h, w) float32 or wider.
        library: windows of the reference images.
        settings: strength is w, 1 replaces entirely. A position counts from log-odds of `threshold` times the
            set's own.
        before: decisions of earlier steps.
        level: the step's noise level; late steps decide nothing new.
        mask: (1 or B, 1, h, w) in [0, 1], where to search and to act.

    Returns:
        The correction, and the decisions up to now.
    """
    threshold = (settings.threshold * library.typical).clamp_min(1e-6).expand(len(denoised))
    score = torch.full_like(threshold, math.nan)
    decided = before
    if level.sigma >= LATEST_DECISION:
        odds, components = patch_log_odds(denoised, library, mask)
        score = odds.flatten(1).amax(1)
        decided = before.copy()
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
    gate = (acting.flatten(1).amax(1) > 0).to(delta.dtype)
    return SafeDenoiserResult(delta, gate, score, threshold), decided


def _decide(
    x: Tensor,
    odds: Tensor,
    components: Tensor,
    library: PatchLibrary,
    threshold: Tensor,
    content: Tensor,
    area: Tensor,
) -> None:
    """Find the subject in one image, and write its replacement into `content` and `area`.

    Args:
        x: (C, h, w) prediction.
        odds: (h', w') log-odds on the grid, components: (h' w', r) of its windows.
        library: windows of the reference images.
        threshold: scalar, log-odds from which a position counts.
        content: (C, h, w) and area: (1, h, w), changed in place.
    """
    for row, column in _best_positions(odds, threshold, library.window // 2):
        middle = [i * library.factor + library.factor // 2 for i in (row, column)]
        if area[0, middle[0], middle[1]] <= 0.5:
            position = torch.tensor([row, column])
            shape = _expected_region(components[row * odds.shape[1] + column], library)
            _replace_at(x, position, shape, library, content, area)


def _best_positions(odds: Tensor, threshold: Tensor, near: int) -> Iterator[tuple[int, int]]:
    """Yield grid positions with log-odds (h', w') above the threshold, best first, more than `near` apart."""
    odds = odds.clone()
    for _ in range(MOST_POSITIONS):
        row, column = divmod(int(odds.argmax()), odds.shape[1])
        if odds[row, column] <= threshold:
            return
        odds[max(0, row - near) : row + near + 1, max(0, column - near) : column + near + 1] = -math.inf
        yield row, column


def _expected_region(component: Tensor, library: PatchLibrary) -> Tensor:
    """Return the posterior mean of the subject's shape in a window, (s, s) in [0, 1], with a soft rim."""
    distance = (component - library.unwanted).square().sum(1)  # (N,)
    shape = torch.einsum("n,nij->ij", torch.softmax(-distance / library.bandwidth, 0), library.regions)
    soft = F.avg_pool2d(shape[None, None], 2 * library.factor + 1, 1, library.factor)[0, 0]
    return (REGION_GAIN * soft).clamp(0, 1)


def _replace_at(
    x: Tensor, position: Tensor, shape: Tensor, library: PatchLibrary, content: Tensor, area: Tensor
) -> None:
    """Write safe content around a grid position, where `shape` (s, s) exceeds the area decided so far."""
    pad = library.window // 2 * library.factor
    found = _nearest_safe_window(x, position, library)
    down, down_inside = _overlap(int(position[0]) * library.factor - pad, len(shape), x.shape[-2])
    across, across_inside = _overlap(int(position[1]) * library.factor - pad, len(shape), x.shape[-1])
    shape = shape[None, down_inside, across_inside]
    new = shape > area[:, down, across]
    content[:, down, across] = torch.where(
        new, found[:, down_inside, across_inside], content[:, down, across]
    )
    area[:, down, across] = torch.where(new, shape, area[:, down, across])


def _overlap(start: int, length: int, size: int) -> tuple[slice, slice]:
    """Return the part of an axis that a window covers, as a slice of the axis and one of the window."""
    covered = slice(max(0, start), min(size, start + length))
    return covered, slice(covered.start - start, covered.stop - start)


def _nearest_safe_window(x: Tensor, position: Tensor, library: PatchLibrary) -> Tensor:
    """Return the neutral window most like the one at a grid position of x (C, h, w): (C, s, s).

    This is the posterior mean over neutral windows: in as many dimensions as a window has, its softmax puts
    all weight on the nearest one. A mixture of several windows would be no image, and would leave its meaning
    to the prompt.
    """
    window, factor = library.window, library.factor
    half = window // 2
    small = F.avg_pool2d(x[None], factor)  # (1, C, h', w')
    own = cut_window(F.pad(small, (half,) * 4, mode="replicate")[0], position, window, 1)
    seen = cut_window(F.pad(torch.ones_like(small[0, :1]), (half,) * 4), position, window, 1)
    others = F.pad(F.avg_pool2d(library.latents, factor), (half,) * 4, mode="replicate")
    squares = F.conv2d(others.square().sum(1, keepdim=True), seen[None])[:, 0]  # (P, h', w')
    distance = squares - 2 * F.conv2d(others, (own * seen)[None])[:, 0]
    best = int(distance.masked_fill(~library.outside, math.inf).argmin())
    image, index = divmod(best, library.outside[0].numel())
    there = torch.tensor(divmod(index, library.outside.shape[-1]))
    padded = F.pad(library.latents[image][None], (half * factor,) * 4, mode="replicate")[0]
    return cut_window(padded, there, window, factor)


class LocalComparison(Comparison):
    """Comparison of the windows of a prediction with those of masked images.

    Its state is the replacement decided so far.
    """

    def __init__(self, library: PatchLibrary, settings: SafeDenoiserSettings) -> None:
        self.settings = settings
        self._stored = library
        self._library = library
        self._decided: Replacement | None = None

    def place(self, device: torch.device, move: MoveReferences, mask: Tensor | None) -> None:
        self._library = self._stored.to(device)

    def correct(self, predictions: Predictions) -> SafeDenoiserResult:
        denoised = predictions.denoised
        before = Replacement.none(denoised) if self._decided is None else self._decided
        result, decided = local_correction(
            denoised, self._library, self.settings, before, predictions.level, predictions.mask
        )
        if predictions.is_new:
            self._decided = decided
        return result

    def for_another_run(self) -> Comparison:
        return LocalComparison(self._stored, self.settings)

    def resume_data(self) -> Replacement | None:
        return self._decided

    def resume(self, data: Replacement) -> None:
        self._decided = data
