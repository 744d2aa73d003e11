"""Uses of a negation set, and the values that Safe Denoiser's settings take for each of them.

A user connects images. What the masks say decides what the set can be used for, and `VALUES` gives the
settings of that use. Windows are shares of the noise schedule, from 0 at pure noise to 1 at its end. The host
converts them for each model, so that flow models and large images get the part of the schedule that Stable
Diffusion 1.x gets. Its noise level (sigma) for each share is given beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import Tensor

from .settings import AUTOMATIC, FEWEST_MASKED, Mode, SafeDenoiserSettings, Use

NEAR_COPIES: Use = "near-copies"
SUBJECT: Use = "a subject anywhere"
STYLE: Use = "a style"

LARGEST_SHOWN = 1000.0
"""Noise level (sigma) above which a window begins with the first step, whatever the model."""


@dataclass(frozen=True)
class UseValues:
    """Values of Safe Denoiser's settings for one use, see `SafeDenoiserSettings`.

    Attributes:
        start_sigma, end_sigma: shares of the noise schedule, in [0, 1], where the window begins and ends.
    """

    strength: float
    start_sigma: float
    end_sigma: float
    threshold: float
    temperature: float
    cap: float


NAMES = tuple(field.name for field in fields(UseValues))
"""Settings that have automatic values, by the names of the nodes' inputs."""

VALUES: dict[Use, tuple[tuple[int, UseValues], ...]] = {
    # Workflow demo_safe_denoiser_memorisation, chosen by evaluation/studies/memorisation.py. Ends at sigma
    # 0.5. With one or two images, the threshold is a correlation of 0.5 (`leave_one_out`).
    NEAR_COPIES: ((1, UseValues(4.0, 0.0, 0.831, 1.0, 0.02, 2.0)),),
    # Workflow demo_safe_denoiser, chosen by evaluation/studies/safe_denoiser.py. Ends at sigma 0.15. The
    # higher threshold for few images is measured there: 23 instead of 20 of 24 harmless images stay right
    # with 32 masked images.
    SUBJECT: (
        (FEWEST_MASKED, UseValues(1.2, 0.0, 0.976, 0.7, 0.1, 2.0)),
        (1, UseValues(1.2, 0.0, 0.976, 1.0, 0.1, 2.0)),
    ),
    # Workflow demo_safe_denoiser_style. Begins at sigma 1.5, where shapes are fixed.
    STYLE: ((1, UseValues(1.0, 0.522, 1.0, 0.2, 0.1, 2.0)),),
}
"""By use: the values, each with the smallest number of reference images for which they hold."""

_PAPER = SafeDenoiserSettings()
PUBLISHED = UseValues(_PAPER.strength, 0.0, 0.2192, _PAPER.threshold, _PAPER.temperature, _PAPER.cap)
"""Values for the modes exact, tempered and official: those of the paper's text-to-image experiments with
Stable Diffusion 1.4. The window is that of DDPM timesteps 1000 to 780, to sigma 4.67."""


@dataclass(frozen=True)
class MaskCounts:
    """Numbers of reference images by what their masks say.

    Attributes:
        marked: images that are unwanted in part. Their masks mark a subject.
        whole: images without a mask, or with one that covers them.
        neutral: images whose masks are empty.
    """

    marked: int
    whole: int
    neutral: int

    @classmethod
    def of(cls, masks: Iterable[Tensor | None]) -> MaskCounts:
        """Count bool masks of any sizes, True where the image is unwanted; None for all of it."""
        marked = whole = neutral = 0
        for mask in masks:
            covers = mask is None or bool(mask.all())
            is_empty = mask is not None and not bool(mask.any())
            whole += covers
            neutral += is_empty
            marked += not covers and not is_empty
        return cls(marked, whole, neutral)

    @classmethod
    def of_regions(cls, regions: Tensor | None, count: int = 0) -> MaskCounts:
        """Count masks (N, 1, h, w) in [0, 1]; without masks, all `count` images are unwanted as a whole."""
        return cls(0, count, 0) if regions is None else cls.of(regions > 0.5)

    @property
    def use(self) -> Use:
        """Return the use that the masks say: a subject is marked, a style has neutral images beside it."""
        if self.marked:
            return SUBJECT
        return STYLE if self.whole and self.neutral else NEAR_COPIES

    def chosen(self, use: str) -> Use:
        """Return the named use, or the one that the masks say when it is `AUTOMATIC`.

        Raises:
            ValueError: the set does not hold what the named use needs.
        """
        if use == AUTOMATIC:
            return self.use
        if use == SUBJECT and not self.marked:
            raise ValueError(
                f"The use '{SUBJECT}' needs masks that mark the subject, and no image of the negation set "
                "has one. Paint masks, or set use to automatic."
            )
        if use == STYLE and not (self.whole and self.neutral):
            raise ValueError(
                f"The use '{STYLE}' needs images of the style without masks and neutral images with empty "
                f"masks, and the negation set has {self.whole} and {self.neutral}. "
                "Combine two such sets, or set use to automatic."
            )
        return use  # type: ignore[return-value]

    def references(self, use: Use) -> int:
        """Return the number of images that show what a use keeps away from."""
        return {SUBJECT: self.marked, STYLE: self.whole, NEAR_COPIES: self.marked + self.whole}[use]


def automatic_values(counts: MaskCounts, use: str, mode: Mode) -> UseValues:
    """Return the values of all settings for a set and a use (`Use` or `AUTOMATIC`) in a mode.

    Raises:
        ValueError: the set does not hold what the named use needs.
    """
    if mode != "calibrated":
        return PUBLISHED
    chosen = counts.chosen(use)
    number = counts.references(chosen)
    rows = VALUES[chosen]
    return next((values for least, values in rows if number >= least), rows[-1][1])


def automatic_in_words(counts: MaskCounts, settings: SafeDenoiserSettings) -> str:
    """Return a sentence on what the automatic settings became; empty when all were set by hand.

    Args:
        counts: of the set's masks.
        settings: those of the run, with their automatic values in place.
    """
    if not settings.automatic:
        return ""
    calibrated = settings.mode == "calibrated"
    title = counts.chosen(settings.use) if calibrated else f"mode {settings.mode}"
    window = settings.window
    bounds = {"start_sigma": window.high, "end_sigma": window.low}
    parts = []
    for name in settings.automatic:
        if name == "start_sigma" and window.high >= LARGEST_SHOWN:
            parts.append("from the first step")
        elif name in bounds:
            parts.append(f"{'from' if name == 'start_sigma' else 'to'} sigma {bounds[name]:.3g}")
        else:
            parts.append(f"{name} {getattr(settings, name):g}")
    return f"Automatic: {title}; {', '.join(parts)}."
