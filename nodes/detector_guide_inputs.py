"""Inputs of DAG Detector + Guide, in groups: detection, window, scale, maps and outcome."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.detect_and_guide.attention_maps import Normalization
from ..guidance.detect_and_guide.settings import DetectAndGuideSettings
from .shared_inputs import HIDDEN

DEFAULTS = DetectAndGuideSettings()

NORMALIZATIONS: tuple[Normalization, ...] = ("joint", "per map")


def _number(
    name: str,
    default: float,
    most: float,
    tooltip: str,
    step: float = 0.01,
    least: float = 0.0,
    advanced: bool = True,
    hidden: bool = False,
) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=default,
        min=least,
        max=most,
        step=step,
        round=0.0001,
        optional=advanced,
        advanced=advanced,
        extra_dict=HIDDEN if hidden else None,
        tooltip=tooltip,
    )


def detection_inputs() -> list[io.Input]:
    """Return the inputs for when and where the concept counts as found."""
    return [
        _number(
            "detection_threshold",
            DEFAULTS.detection_threshold,
            1.0,
            "How certain the detector must be before the concept counts as found. A higher value "
            "leaves more images unchanged; a lower one catches more. Start with 0.5, for which the "
            "tokens were calibrated.",
            advanced=False,
        ),
        _number(
            "hold_threshold",
            DEFAULTS.hold_threshold,
            1.0,
            "Detection threshold after the concept was found once in an image. A lower "
            "value keeps guiding while the subject fades. Start with 0.5, as in the "
            "paper; use 0.3 to be thorough.",
        ),
        _number(
            "edit_threshold",
            DEFAULTS.edit_threshold,
            1.0,
            "How certain the detector must be at a position around a detection before it may change. "
            "A lower value changes a larger area. Start with 0, which uses the paper's 0.01, or the "
            "tokens' background noise if that is higher.",
            step=0.001,
            hidden=True,
        ),
        _number(
            "core",
            DEFAULTS.core,
            1.0,
            "Positions below the detection threshold also count as the subject if their certainty "
            "reaches this share of the image's highest; 0 is off. A higher value adds fewer "
            "positions. Start with 0, as in the paper; use 0.6 if the detector is certain only of the"
            " subject's centre.",
        ),
        _number(
            "reach",
            DEFAULTS.reach,
            1.0,
            "How far around the subject the image may change, as a share of the image's longer side; "
            "0 sets no limit. A lower value protects what is next to the subject. Start with 0, as in"
            " the paper, or 0.06.",
        ),
    ]


def window_inputs() -> list[io.Input]:
    """Return the inputs for the noise levels at which the method acts."""
    return [
        _number(
            "start_sigma",
            DEFAULTS.window.high,
            1000.0,
            "Noise level (sigma) at which the method begins. A higher value begins "
            "earlier, when the attention maps are less certain. Start with 7.56, the "
            "paper's step 5 of 50.",
        ),
        _number(
            "end_sigma",
            0.0,
            1000.0,
            "Noise level (sigma) at which the method stops. A higher value leaves "
            "details unchanged. Start with 0.",
        ),
    ]


def scale_inputs() -> list[io.Input]:
    """Return the inputs for how strongly the detected positions are changed."""
    return [
        _number(
            "base",
            DEFAULTS.base,
            1000.0,
            "Guidance scale for a subject that fills the image; the scale shrinks with the subject's "
            "area (AreaScaler). A higher value guides more strongly. Start with 5, the paper's; small"
            " subjects need more, such as 50.",
        ),
        _number(
            "coverage",
            DEFAULTS.coverage,
            1.01,
            "If this share of the image is above the edit threshold, the map is too vague and nothing"
            " is changed. A higher value also acts on vaguer maps. Start with 0.8.",
            hidden=True,
        ),
        _number(
            "magnitude",
            DEFAULTS.magnitude,
            100.0,
            "How many times more strongly the most certain positions may be guided than uncertain "
            "ones (MagnitudeScaler); 1 is off. A higher value concentrates the guidance on certain "
            "positions. Start with 5, the paper's.",
            step=0.1,
            least=1.0,
            hidden=True,
        ),
        _number(
            "cap",
            DEFAULTS.cap,
            1000.0,
            "Upper limit of the guidance scale. A lower value is gentler. Start with 10.",
            step=0.1,
        ),
        _number(
            "quantile",
            DEFAULTS.quantile,
            1.0,
            "For the SEGA mask: share of the positions in each channel that stay unchanged. A higher "
            "value changes less. Start with 0.9.",
        ),
        _number(
            "sld_threshold",
            DEFAULTS.sld_threshold,
            10.0,
            "For the SLD mask: a value changes unless the prompt exceeds the safety text by at least "
            "this much. A higher value changes more. Start with 0.025, the paper's.",
            step=0.001,
            least=-10.0,
            hidden=True,
        ),
    ]


def map_inputs() -> list[io.Input]:
    """Return the inputs for how attention maps are read."""
    return [
        io.Combo.Input(
            "connectivity",
            options=["8", "4"],
            default=str(DEFAULTS.connectivity),
            optional=True,
            advanced=True,
            extra_dict=HIDDEN,
            tooltip="Whether positions that touch only at a corner are one object (8) or two (4).",
        ),
        io.Combo.Input(
            "fill",
            options=["nearest", "blur"],
            default=DEFAULTS.fill,
            optional=True,
            advanced=True,
            extra_dict=HIDDEN,
            tooltip="How an object's scale extends to the less certain positions around it. "
            "nearest takes the scale of the nearest object; blur fades it out.",
        ),
        io.Combo.Input(
            "normalization",
            options=list(NORMALIZATIONS),
            default="joint",
            optional=True,
            advanced=True,
            extra_dict=HIDDEN,
            tooltip="How attention maps are normalised. joint keeps images without the concept "
            "below the threshold. per map follows the paper's wording, and every image "
            "then counts as detected.",
        ),
        io.Boolean.Input(
            "stacked",
            default=DEFAULTS.stacked,
            optional=True,
            advanced=True,
            extra_dict=HIDDEN,
            tooltip="Average the maps of all steps so far instead of using those of the current "
            "step. The result is steadier and reacts more slowly.",
        ),
    ]


def outcome_inputs() -> list[io.Input]:
    """Return the inputs for how the changed prediction is kept in bounds, and for two-pass mode."""
    return [
        io.Boolean.Input(
            "bounded",
            default=DEFAULTS.bounded,
            optional=True,
            advanced=True,
            tooltip="Keep the changed prediction within the range of values it had. This "
            "prevents over-saturation and grain at large scales. Start with off, as in "
            "the paper.",
        ),
        io.Boolean.Input(
            "look_first",
            default=DEFAULTS.look_first,
            optional=True,
            tooltip="Two-pass mode: sample once without guidance to locate the subject, then "
            "again with guidance. Detection is more reliable and everything around the "
            "subject stays unchanged; images with a detection take twice the time. "
            "Start with off, as in the paper.",
        ),
    ]
