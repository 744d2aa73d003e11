"""Negation sets in words: what a set holds, what was read from a folder, the closest references of images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..formats.image_files import Skipped
from ..formats.negation_set import NegationSet, without_duplicates
from ..guidance.core.references import References
from ..guidance.safe_denoiser.settings import SafeDenoiserSettings
from .set_statistics import NEAR_DUPLICATE, set_statistics

DEFAULTS = SafeDenoiserSettings()
ENOUGH_MASKED = 64
"""Sets of 16, 32, 64 and 96 masked images change 10, 4, 2 and 0 of 24 harmless images of the demo model."""
SIZES_SHOWN = 4


def summarize(negation_set: NegationSet, references: References | None) -> str:
    """Describe a set in a few lines of text.

    Args:
        negation_set: the set.
        references: its images as they are compared; None leaves the similarities out, as for a single image.
    """
    unique = len(without_duplicates(negation_set))
    lines = [
        f"{negation_set.name or 'unnamed'}: {len(negation_set)} images ({unique} different), "
        f"{_sizes(negation_set)} pixels",
        _masks(negation_set),
        f"source: {negation_set.source or 'not stated'}",
        f"licence: {negation_set.licence or 'not stated'}",
        f"hash: {negation_set.content_hash[:16]}",
    ]
    return "\n".join([*lines, *([] if references is None else _similarities(references))])


def _sizes(negation_set: NegationSet) -> str:
    sizes = negation_set.sizes()
    shown = ", ".join(f"{width} x {height}" for width, height in sizes[:SIZES_SHOWN])
    return f"{shown} and others" if len(sizes) > SIZES_SHOWN else shown


def _masks(negation_set: NegationSet) -> str:
    """Describe the masks, which decide how Safe Denoiser uses the set in calibrated mode."""
    shares = [1.0 if mask is None else (mask > 127).float().mean().item() for mask in negation_set.masks]
    empty = sum(share == 0 for share in shares)
    subjects = sum(0 < share < 1 for share in shares)
    if subjects:
        few = f"; with fewer than about {ENOUGH_MASKED}, harmless images change too"
        line = f"masks: {subjects} mark a subject, which is searched for at every position"
        return line + few if subjects < ENOUGH_MASKED else line
    if 0 < empty < len(shares):
        return f"masks: {empty} empty (neutral references); the other {len(shares) - empty} define a style"
    return "masks: none that mark a subject; whole images are compared"


def _similarities(references: References) -> list[str]:
    found = set_statistics(references, DEFAULTS.temperature)
    pairs = ", ".join(f"{first + 1} and {second + 1} ({value:.2f})" for value, first, second in found.closest)
    return [
        f"similarity of two images: {found.mean_similarity:.2f} on average of {found.compared} "
        "(0 unrelated, 1 the same)",
        f"near duplicates (above {NEAR_DUPLICATE}): {found.near_duplicates} pairs; closest: {pairs}",
        f"calibration: an image resembles the others at {found.typical:.3f}; with threshold "
        f"{DEFAULTS.threshold:g}, Safe Denoiser acts from {DEFAULTS.threshold * found.typical:.3f}",
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
