"""Negation sets in words: what a set holds, what was read from a folder, the closest references of images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..formats.image_files import Skipped
from ..formats.negation_set import NegationSet, without_duplicates
from ..guidance.core.references import References
from ..guidance.safe_denoiser.uses import NEAR_COPIES, STYLE, SUBJECT, MaskCounts, automatic_values
from .set_statistics import NEAR_DUPLICATE, set_statistics

ENOUGH_MASKED = 64
"""Sets of 16, 32, 64 and 96 masked images change 10, 4, 2 and 0 of 24 harmless images of the demo model."""
ENOUGH_STYLED, ENOUGH_NEUTRAL = 4, 12
"""Images that define a style on the demo model, beside neutral images."""
SIZES_SHOWN = 4


def summarize(negation_set: NegationSet, references: References | None) -> str:
    """Describe a set in a few lines of text.

    Args:
        negation_set: the set.
        references: its images as they are compared; None leaves the similarities out, as for a single image.
    """
    unique = len(without_duplicates(negation_set))
    counts = MaskCounts.of(None if mask is None else mask > 127 for mask in negation_set.masks)
    lines = [
        f"{negation_set.name or 'unnamed'}: {len(negation_set)} images ({unique} different), "
        f"{_sizes(negation_set)} pixels",
        *_use(counts),
        f"source: {negation_set.source or 'not stated'}",
        f"licence: {negation_set.licence or 'not stated'}",
        f"hash: {negation_set.content_hash[:16]}",
    ]
    return "\n".join([*lines, *([] if references is None else _similarities(references, counts))])


def _sizes(negation_set: NegationSet) -> str:
    sizes = negation_set.sizes()
    shown = ", ".join(f"{width} x {height}" for width, height in sizes[:SIZES_SHOWN])
    return f"{shown} and others" if len(sizes) > SIZES_SHOWN else shown


def _use(counts: MaskCounts) -> list[str]:
    """Describe what the set can be used for in Safe Denoiser, and what it lacks for that."""
    kinds = f"{counts.marked} mark a subject, {counts.neutral} are empty (neutral images)"
    masks = f"masks: {kinds}, {counts.whole} images are unwanted as a whole"
    if not counts.marked and not counts.whole:
        return [masks, "use: none yet, because nothing is marked as unwanted. Add images of what is unwanted"]
    explained = {
        SUBJECT: "which Safe Denoiser searches for at every position",
        STYLE: "which Safe Denoiser recognises by its texture, whatever the image shows",
        NEAR_COPIES: "Safe Denoiser compares whole images; one image is enough",
    }
    lines = [masks, f"use: {counts.use}, {explained[counts.use]}"]
    return lines + [f"to do: {advice}" for advice in _lacks(counts)]


def _lacks(counts: MaskCounts) -> list[str]:
    """Return what to add to the set, a sentence each; none when it has enough for its use."""
    if counts.use == SUBJECT:
        missing = ENOUGH_MASKED - counts.marked - counts.neutral
        advice = (
            f"add about {missing} images without it (with empty masks), or further masked ones: with fewer "
            f"than about {ENOUGH_MASKED} images, harmless images change too"
        )
        return [advice] if missing > 0 else []
    if counts.use == NEAR_COPIES:
        return [
            f"for a subject at any position, paint masks on it; for a style, add about {ENOUGH_NEUTRAL} "
            "images without it, with empty masks"
        ]
    found = []
    if counts.whole < ENOUGH_STYLED:
        found.append(f"add about {ENOUGH_STYLED - counts.whole} images in the style")
    if counts.neutral < ENOUGH_NEUTRAL:
        missing = ENOUGH_NEUTRAL - counts.neutral
        found.append(f"add about {missing} images without the style, with empty masks")
    return found


def _similarities(references: References, counts: MaskCounts) -> list[str]:
    values = automatic_values(MaskCounts(0, len(references), 0), NEAR_COPIES, "calibrated")
    found = set_statistics(references, values.temperature)
    pairs = ", ".join(f"{first + 1} and {second + 1} ({value:.2f})" for value, first, second in found.closest)
    lines = [
        f"similarity of two images: {found.mean_similarity:.2f} on average of {found.compared} "
        "(0 unrelated, 1 the same)",
        f"near duplicates (above {NEAR_DUPLICATE}): {found.near_duplicates} pairs; closest: {pairs}",
    ]
    if counts.use != NEAR_COPIES:
        return lines
    return [
        *lines,
        f"calibration: an image resembles the others at {found.typical:.3f}; with threshold "
        f"{values.threshold:g} (automatic), Safe Denoiser acts from {values.threshold * found.typical:.3f}",
    ]


def folder_in_words(kept: int, found: int, skipped: Sequence[Skipped]) -> str:
    """Describe what became of the images of a folder, in a line, and a line for every skipped file."""
    first = f"{kept} images, {found - kept} duplicates dropped, {len(skipped)} files skipped"
    return "\n".join([first, *(f"{file.path}: {file.reason}" for file in skipped)])


def closest_in_words(similarities: Tensor, indices: Tensor) -> str:
    """List the closest references of each image, in a line per image.

    Args:
        similarities: (B, k) of an image to its k closest references.
        indices: (B, k) of these references in the set.
    """
    lines = []
    for row, (values, places) in enumerate(zip(similarities.tolist(), indices.tolist())):
        found = ", ".join(f"reference {place + 1} at {value:.3f}" for value, place in zip(values, places))
        lines.append(f"image {row + 1}: {found}")
    return "\n".join(lines)
