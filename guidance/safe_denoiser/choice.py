"""Choice of the way to compare a negation set, from the mode and from what the set's masks say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..core.references import References
from .exact import ExactComparison
from .interface import Comparison
from .local import LocalComparison
from .official import OfficialComparison
from .patch_posterior import build_patch_library
from .settings import Mode, SafeDenoiserSettings
from .style import StyleComparison
from .style_posterior import build_style_library
from .tempered import TemperedComparison
from .uses import STYLE, SUBJECT, MaskCounts
from .whole_image import WholeImageComparison


def choose_comparison(references: References, settings: SafeDenoiserSettings) -> Comparison:
    """Return the comparison of the settings' mode, with what it computes from the references.

    In calibrated mode with automatic use, masks that mark parts of images mark a subject, which is searched
    at every position. Empty masks mark neutral images; the other images then define a style. Without masks
    images are compared as a whole. A use that is named is taken, and near-copies then ignore masks.

    Raises:
        ValueError: the masks mark nothing, or nothing that can be seen at this size; or the set does not hold
            what the named use needs.
    """
    if references.regions is not None and not bool((references.regions > 0.5).any()):
        raise ValueError(
            "The masks of the negation set are too small at this size: they cover less than half of every "
            "latent pixel. Paint larger masks, or sample a larger image."
            if bool(references.regions.any())
            else "Nothing is marked as unwanted: the masks of all images are empty. Paint a mask on what is "
            "unwanted or disconnect it."
        )
    return CHOICES[settings.mode](references, settings)


def _calibrated(references: References, settings: SafeDenoiserSettings) -> Comparison:
    regions = references.regions
    use = MaskCounts.of_regions(regions, len(references)).chosen(settings.use)
    if regions is None or use not in (SUBJECT, STYLE):
        return WholeImageComparison(_without_neutral(references), settings)
    latents = references.read(slice(None))
    if use == SUBJECT:
        return LocalComparison(build_patch_library(latents, regions.float(), settings.temperature), settings)
    return StyleComparison(build_style_library(latents, regions.float()), settings)


def _without_neutral(references: References) -> References:
    """Return the references without those whose masks are empty: nothing keeps away from them."""
    if references.regions is None:
        return references
    unwanted = (references.regions > 0.5).flatten(1).any(1)
    if bool(unwanted.all()):
        return references
    return replace(references, latents=references.latents[unwanted], regions=None)


CHOICES: dict[Mode, Callable[[References, SafeDenoiserSettings], Comparison]] = {
    "calibrated": _calibrated,
    "exact": ExactComparison,
    "tempered": TemperedComparison,
    "official": OfficialComparison,
}
