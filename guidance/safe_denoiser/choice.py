"""Choice of the way to compare a negation set, from the mode and from what the set's masks say."""

from __future__ import annotations

from collections.abc import Callable

from ..core.references import References
from .exact import ExactComparison
from .interface import Comparison
from .local import LocalComparison
from .official import OfficialComparison
from .patch_posterior import build_patch_library, marks_subject
from .settings import Mode, SafeDenoiserSettings
from .style import StyleComparison
from .style_posterior import build_style_library, marks_style
from .tempered import TemperedComparison
from .whole_image import WholeImageComparison


def choose_comparison(references: References, settings: SafeDenoiserSettings) -> Comparison:
    """Return the comparison of the settings' mode, with what it computes from the references.

    In calibrated mode, masks that mark parts of images mark a subject, which is searched at every position.
    Empty masks mark neutral images; the other images then define a style. Without masks images are compared
    as a whole.

    Raises:
        ValueError: the masks mark nothing, or nothing that can be seen at this size.
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
    if regions is not None and marks_subject(regions):
        library = build_patch_library(references.read(slice(None)), regions.float(), settings.temperature)
        return LocalComparison(library, settings)
    if regions is not None and marks_style(regions):
        return StyleComparison(build_style_library(references.read(slice(None)), regions.float()), settings)
    return WholeImageComparison(references, settings)


CHOICES: dict[Mode, Callable[[References, SafeDenoiserSettings], Comparison]] = {
    "calibrated": _calibrated,
    "exact": ExactComparison,
    "tempered": TemperedComparison,
    "official": OfficialComparison,
}
