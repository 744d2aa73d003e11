"""Settings of Safe Denoiser that do not fit what the masks of a negation set say, in sentences for people."""

from __future__ import annotations

from torch import Tensor

from .settings import FEWEST_MASKED, SafeDenoiserSettings
from .uses import STYLE, SUBJECT, MaskCounts

LATEST_END = 1.0
"""A window that ends at more noise leaves the subject to be drawn again, or a style undisturbed."""

WEAK, TIGHT = 0.8, 1.0
"""A lower strength replaces only a part; a lower cap does not let a large subject be replaced at once."""

EARLY_STYLE = 3.0
"""Noise level above which removing a style also bends shapes."""


def mismatches(regions: Tensor | None, settings: SafeDenoiserSettings) -> list[str]:
    """Return a sentence for every setting that does not fit the set, with what to do; none if all fit.

    Args:
        regions: (N, 1, h, w) in [0, 1], the masks at the size of the run; None without masks.
        settings: those of the run.
    """
    found = []
    if settings.mode == "calibrated" and settings.threshold <= 0:
        found.append(
            f"Threshold {settings.threshold:g} lets the method act on every image. "
            "Start with 0.4, or 0.7 with masks."
        )
    if regions is None:
        return found
    inside = regions.flatten(1) > 0.5
    vanished = int((regions.flatten(1).any(1) & ~inside.any(1)).sum())
    if vanished:
        found.append(f"{_images(vanished)} too small at this size and count as empty. Paint larger masks.")
    if settings.mode != "calibrated":
        if not bool(inside.all()):
            found.append(
                f"Mode {settings.mode} ignores masks and keeps away from whole images, also from neutral "
                "ones. Choose calibrated."
            )
        return found
    counts = MaskCounts.of_regions(regions)
    use = counts.chosen(settings.use)
    if use == SUBJECT:
        found += _whole_image_settings(settings, "with masks", end=0.15)
        if counts.marked < FEWEST_MASKED:
            found.append(
                f"The set has {counts.marked} masked images: with fewer than {FEWEST_MASKED}, harmless "
                "images change too. Add images or raise the threshold."
            )
    elif use == STYLE:
        found += _whole_image_settings(settings, "for a style", end=0.0)
        if settings.window.high > EARLY_STYLE and "start_sigma" not in settings.automatic:
            found.append("An early start bends shapes. For a style set start_sigma to 1.5.")
    return found


def _whole_image_settings(settings: SafeDenoiserSettings, purpose: str, end: float) -> list[str]:
    """Return the settings that suit sets without masks only."""
    wrong = []
    if settings.window.low > LATEST_END and "end_sigma" not in settings.automatic:
        wrong.append((f"end_sigma {settings.window.low:g} stops too early", f"end_sigma to {end:g}"))
    if 0 < settings.strength < WEAK:
        wrong.append((f"strength {settings.strength:g} replaces only a part", "strength to 1"))
    if settings.cap < TIGHT:
        wrong.append((f"cap {settings.cap:g} holds the change back", "cap to 2"))
    if not wrong:
        return []
    problems, advice = zip(*wrong)
    return [f"These are settings for whole images: {', '.join(problems)}. Set {', '.join(advice)} {purpose}."]


def _images(count: int) -> str:
    return "The mask of 1 image is" if count == 1 else f"The masks of {count} images are"
