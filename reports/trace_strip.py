"""Trace as an image: a lane per method and a bar per model call, from high noise (left) to none (right)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .trace import Summary, Trace

Theme = Literal["dark", "light"]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
SCALE = 2
"""Pixels drawn per displayed pixel; the image must be readable at a width of 400 pixels."""
WIDTH = 400 * SCALE
MARGIN = 8 * SCALE
FONT = 12 * SCALE
BARS = 34 * SCALE
LANE = FONT + BARS + 12 * SCALE
AXIS = FONT + 6 * SCALE
WATCHED = 2 * SCALE
"""Height of the tick of a call at which a method was allowed to act and did not."""

OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
"""Colours that are distinct with every kind of colour vision. Lanes also differ in position and label."""


@dataclass(frozen=True)
class Colors:
    background: str
    text: str
    line: str


THEMES = {"dark": Colors("#202020", "#f0f0f0", "#8a8a8a"), "light": Colors("#ffffff", "#1a1a1a", "#767676")}


def strip(trace: Trace, theme: Theme = "dark") -> Tensor:
    """Draw a trace: (1, H, W, 3) in [0, 1].

    A bar's height is the largest change of any sample at that call, relative to the method's largest change.
    """
    colors, font = THEMES[theme], ImageFont.load_default(FONT)
    lanes = max(1, len(trace.methods))
    image = Image.new("RGB", (WIDTH, lanes * LANE + AXIS + MARGIN), colors.background)
    draw = ImageDraw.Draw(image)
    if not trace.methods:
        draw.text((MARGIN, MARGIN), "No correction was attached.", colors.text, font)
    for index, method in enumerate(trace.methods):
        _lane(draw, trace, method, MARGIN + index * LANE, OKABE_ITO[index % len(OKABE_ITO)], colors, font)
    if trace.sigmas:
        _axis(draw, trace, MARGIN + lanes * LANE, colors, font)
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, WIDTH, 3) / 255
    )


def label(summary: Summary) -> str:
    """Return a lane's heading."""
    if summary.acted:
        extra = f", +{summary.forwards} predictions" if summary.forwards else ""
        return f"{summary.method}: {summary.acted} acts, up to {summary.largest_change:.1%}{extra}"
    return f"{summary.method}: " + ("watched, changed nothing" if summary.allowed else "not active")


def _columns(trace: Trace) -> list[tuple[int, int]]:
    """Return the left and right edge of every model call."""
    calls = len(trace.sigmas)
    edges = [MARGIN + (WIDTH - 2 * MARGIN) * i // calls for i in range(calls + 1)]
    return [(left, max(left + 1, right - SCALE)) for left, right in zip(edges[:-1], edges[1:])]


def _lane(
    draw: ImageDraw.ImageDraw, trace: Trace, method: str, top: int, fill: str, colors: Colors, font: Font
) -> None:
    summary, columns = trace.summary(method), _columns(trace)
    draw.text((MARGIN, top), _fitted(draw, label(summary), font), colors.text, font)
    base = top + FONT + 4 * SCALE + BARS
    draw.line((MARGIN, base, WIDTH - MARGIN, base), colors.line, SCALE)
    for record in trace.of(method):
        left, right = columns[record.call]
        if record.acted:
            height = max(2 * WATCHED, round(BARS * max(record.change) / summary.largest_change))
            draw.rectangle((left, base - height, right, base), fill)
        else:
            draw.rectangle((left, base - WATCHED, right, base), colors.line)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Font) -> str:
    """Return the text, truncated to the strip's width."""
    if draw.textlength(text, font) <= WIDTH - 2 * MARGIN:
        return text
    while draw.textlength(text + "...", font) > WIDTH - 2 * MARGIN:
        text = text[:-1]
    return text + "..."


def _axis(draw: ImageDraw.ImageDraw, trace: Trace, top: int, colors: Colors, font: Font) -> None:
    first, last = f"sigma {trace.sigmas[0]:.3g}", f"{trace.sigmas[-1]:.3g}"
    draw.text((MARGIN, top), first, colors.text, font)
    draw.text((WIDTH - MARGIN - draw.textlength(last, font), top), last, colors.text, font)
