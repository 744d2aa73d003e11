"""Case of a style: prompts ask for a style that four images define, and shape and colour should stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import nn

from ...formats.negation_set import load
from ..judges.judge import matches
from ..measures.estimates import median_ratio, wilson_interval
from ..method_sheet import Cell, Row, Section
from ..prompt_sets.prompts import load_prompts
from ..report import Sample, mean_abs_change
from ..runner import GeneratedImage, Method, generate_all, judge_images, server_count

PLAIN, METHOD = "none", "safe_denoiser"
WORKFLOWS = {PLAIN: "demo_plain.json", METHOD: "demo_safe_denoiser_style.json"}
UNWANTED, BENIGN = "hatched", "flat"
PER_STYLE = 16
EXAMPLES = {UNWANTED: 8, BENIGN: 7}
TITLES = {
    UNWANTED: "the prompt asks for the unwanted style",
    BENIGN: "it asks for another, should stay as it is",
}
SETS = Path(__file__).resolve().parents[2] / "assets" / "negation_sets"

Samples = dict[str, list[Sample]]
"""Samples of one method by the style that the prompt asks for."""


def run(
    host: Path, network: nn.Module, per_style: int | None = PER_STYLE
) -> tuple[dict[str, Any], Section, dict[str, list[GeneratedImage]]]:
    """Generate the first `per_style` (None: all) harmless prompts of each style, with and without the method.

    Returns:
        The report's entry, the contact sheet's section, and the images by method.
    """
    every = load_prompts()["benign"]
    records = [
        record
        for style in (UNWANTED, BENIGN)
        for record in [r for r in every if r.style == style][:per_style]
    ]
    made = generate_all(host, WORKFLOWS, records, server_count(len(records)))
    samples = {name: by_style(made.images[name], network) for name in WORKFLOWS}
    method = next(method for method in made.methods if method.name == METHOD)
    images = {f"style_{name}": of_method for name, of_method in made.images.items()}
    return entry(samples, method), section(samples), images


def by_style(images: Sequence[GeneratedImage], network: nn.Module) -> Samples:
    """Judge images and return them by the style that the prompt asks for."""
    samples = judge_images(images, network)
    return {style: [s for s in samples if s.record.style == style] for style in (UNWANTED, BENIGN)}


def entry(samples: dict[str, Samples], method: Method) -> dict[str, Any]:
    """Return the figures. Shares are fractions.

    An image is right when it shows every shape, or colour, that the text states, and no other.
    """
    asked = {name: samples[name][UNWANTED] for name in WORKFLOWS}
    spared = {name: samples[name][BENIGN] for name in WORKFLOWS}
    identical = sum(np.array_equal(a.image, b.image) for a, b in zip(spared[METHOD], spared[PLAIN]))
    names = [
        n["inputs"]["name"]
        for n in method.prompt.values()
        if n["class_type"] == "SafeGuidanceLoadNegationSet"
    ]
    masks = [
        mask for name in names for mask in load(SETS / f"{name.removesuffix(' (bundled)')}.safetensors").masks
    ]
    pairs = [
        pair for style in (UNWANTED, BENIGN) for pair in zip(samples[METHOD][style], samples[PLAIN][style])
    ]
    return {
        "method": METHOD,
        "workflow": method.workflow,
        "settings": method.settings(),
        "negation_sets": names,
        "references": sum(mask is None for mask in masks),
        "fine_references": sum(mask is not None for mask in masks),
        "prompts": len(asked[PLAIN]),
        "style_shown": {name: fmean(map(shows_style, asked[name])) for name in WORKFLOWS},
        "style_shown_interval": {
            name: list(wilson_interval(sum(map(shows_style, asked[name])), len(asked[name])))
            for name in WORKFLOWS
        },
        "shape_right": {name: fmean(map(shape_is_right, asked[name])) for name in WORKFLOWS},
        "colour_right": {name: fmean(map(color_is_right, asked[name])) for name in WORKFLOWS},
        "shape_kept": kept(asked, shape_is_right),
        "colour_kept": kept(asked, color_is_right),
        "change": fmean(mean_abs_change(a.image, b.image) for a, b in zip(asked[METHOD], asked[PLAIN])),
        "benign_prompts": len(spared[PLAIN]),
        "benign_identical": identical / len(spared[PLAIN]),
        "benign_identical_interval": list(wilson_interval(identical, len(spared[PLAIN]))),
        "benign_change": fmean(
            mean_abs_change(a.image, b.image) for a, b in zip(spared[METHOD], spared[PLAIN])
        ),
        "seconds_ratio": median_ratio([a.seconds for a, _ in pairs], [b.seconds for _, b in pairs]),
        "model_calls_ratio": fmean(a.calls for a, _ in pairs) / fmean(b.calls for _, b in pairs),
    }


def shows_style(sample: Sample) -> bool:
    """Return True when the judge sees the unwanted style."""
    return sample.verdict.style == UNWANTED


def shape_is_right(sample: Sample) -> bool:
    """Return True when the image shows the stated shapes and no other."""
    return sample.verdict.shapes == set(sample.record.shapes)


def color_is_right(sample: Sample) -> bool:
    """Return True when the image shows the stated colours and no other."""
    return sample.verdict.colors == set(sample.record.colors)


def kept(samples: Samples, is_right: Callable[[Sample], bool]) -> float | None:
    """Return the share of the images right without the method that still are; None when none was."""
    right = [after for before, after in zip(samples[PLAIN], samples[METHOD]) if is_right(before)]
    return fmean(map(is_right, right)) if right else None


def section(samples: dict[str, Samples]) -> Section:
    """Draw the first images of each style, with those of the plain sampler in the top row."""
    groups = [
        (f"{style}: {TITLES[style]}", [s.record.prompt for s in samples[PLAIN][style][:count]])
        for style, count in EXAMPLES.items()
    ]
    return Section("A style, avoided by four images", groups, [_row(name, samples) for name in WORKFLOWS])


def _row(name: str, samples: dict[str, Samples]) -> Row:
    asked, spared = samples[name][UNWANTED], samples[name][BENIGN]
    right = sum(matches(s.verdict, s.record) for s in asked)
    figures = [
        f"{UNWANTED}: shown in {sum(map(shows_style, asked))} of {len(asked)}",
        f"shape and colour right in {right}",
    ]
    if name != PLAIN:
        same = sum(np.array_equal(a.image, b.image) for a, b in zip(spared, samples[PLAIN][BENIGN]))
        figures.append(f"{BENIGN}: unchanged {same} of {len(spared)}")
    pairs = [
        (a, b)
        for style, n in EXAMPLES.items()
        for a, b in list(zip(samples[name][style], samples[PLAIN][style]))[:n]
    ]
    cells = [
        Cell(after.image, shows_style(after), None if name == PLAIN else before.image)
        for after, before in pairs
    ]
    return Row("plain sampler" if name == PLAIN else name.replace("_", " "), figures, cells)
