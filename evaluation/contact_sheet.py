"""A picture of an evaluation, readable at a glance: before, after and what changed, framed by the judge's verdict."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .prompts import SETS
from .report import MethodRun, Picture, Sample

EXAMPLES = 12
AMPLIFICATION = 4
PICTURE, FRAME, GAP, MARGIN = 128, 5, 10, 24
TEXT_LINES, TEXT_WRAP = 6, 22
LABEL_WIDTH, LINE_HEIGHT = 92, 14
TITLE_HEIGHT, SET_HEIGHT, LEGEND_HEIGHT = 44, 46, 34
CELL = PICTURE + 2 * FRAME
PROMPT_HEIGHT = TEXT_LINES * LINE_HEIGHT
PAPER, INK, PALE = (250, 250, 248), (24, 24, 28), (110, 110, 116)
UNSAFE, SAFE, NEUTRAL = (214, 40, 40), (34, 150, 74), (196, 196, 196)
SET_TITLES = {
    "named": "The prompt names the unwanted concept",
    "implied": "The prompt only implies it",
    "benign": "Benign prompts, which should stay as they are",
}
Color = tuple[int, int, int]


def contact_sheet(runs: Sequence[MethodRun], examples: int = EXAMPLES) -> Image.Image:
    """The sheet: a block for each method after the first run, which is the plain sampler; a block for that one when it is alone.

    Each block has the first `examples` pictures of each prompt set.
    """
    plain, methods = runs[0], runs[1:] or runs[:1]
    heights = [_block_height(method is not plain) for method in methods]
    columns = min(examples, max(len(samples) for samples in plain.samples.values()))
    width = 2 * MARGIN + LABEL_WIDTH + columns * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + LEGEND_HEIGHT + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _legend(draw)
    top = MARGIN + LEGEND_HEIGHT
    for method, height in zip(methods, heights):
        _block(sheet, draw, top, method, plain, columns)
        top += height
    return sheet


def difference(before: Picture, after: Picture) -> Picture:
    """The absolute difference of two pictures, AMPLIFICATION times as bright."""
    change: Picture = (np.abs(before.astype(np.int16) - after) * AMPLIFICATION).clip(0, 255).astype(np.uint8)
    return change


def _rows(is_compared: bool) -> int:
    return 3 if is_compared else 1


def _block_height(is_compared: bool) -> int:
    return TITLE_HEIGHT + len(SETS) * (SET_HEIGHT + PROMPT_HEIGHT + _rows(is_compared) * (CELL + GAP))


def _legend(draw: ImageDraw.ImageDraw) -> None:
    left = MARGIN
    for color, text in (
        (UNSAFE, "the judge sees the unwanted concept"),
        (SAFE, "it does not"),
        (NEUTRAL, f"change, {AMPLIFICATION} times amplified"),
    ):
        draw.rectangle((left, MARGIN, left + 18, MARGIN + 18), outline=color, width=FRAME)
        draw.text((left + 26, MARGIN), text, INK, _font(15))
        left += 60 + int(draw.textlength(text, _font(15)))


def _block(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, run: MethodRun, plain: MethodRun, columns: int) -> None:
    draw.text((MARGIN, top), run.method.replace("_", " "), INK, _font(30))
    top += TITLE_HEIGHT
    for name in SETS:
        befores, afters = plain.samples[name], run.samples[name]
        top += SET_HEIGHT
        draw.text((MARGIN, top), f"{SET_TITLES[name]}: {_summary(befores, afters, run is not plain)}", INK, _font(20), anchor="ls")
        _labels(draw, top + PROMPT_HEIGHT, run is not plain)
        for column, (before, after) in enumerate(islice(zip(befores, afters), columns)):
            left = MARGIN + LABEL_WIDTH + column * (CELL + GAP)
            _example(sheet, draw, (left, top), before, after if run is not plain else None)
        top += PROMPT_HEIGHT + _rows(run is not plain) * (CELL + GAP)


def _summary(befores: Sequence[Sample], afters: Sequence[Sample], is_compared: bool) -> str:
    before, after = (f"{sum(sample.verdict.unsafe for sample in samples)} of {len(samples)}" for samples in (befores, afters))
    return f"unsafe {before} before, {after} after" if is_compared else f"unsafe {before}"


def _labels(draw: ImageDraw.ImageDraw, top: int, is_compared: bool) -> None:
    for row, label in enumerate(("before", "after", "change")[: _rows(is_compared)]):
        draw.text((MARGIN, top + row * (CELL + GAP) + CELL // 2), label, PALE, _font(18), anchor="lm")


def _example(sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], before: Sample, after: Sample | None) -> None:
    left, top = corner
    lines = wrap(before.record.prompt, TEXT_WRAP)[:TEXT_LINES]
    draw.multiline_text((left, top + PROMPT_HEIGHT - 6), "\n".join(lines), INK, _font(11), anchor="ld", spacing=2)
    cells: list[tuple[Picture, Color]] = [(before.picture, _color(before))]
    if after is not None:
        cells += [(after.picture, _color(after)), (difference(before.picture, after.picture), NEUTRAL)]
    for row, (picture, color) in enumerate(cells):
        y = top + PROMPT_HEIGHT + row * (CELL + GAP)
        draw.rectangle((left, y, left + CELL - 1, y + CELL - 1), fill=color)
        sheet.paste(Image.fromarray(picture).resize((PICTURE, PICTURE)), (left + FRAME, y + FRAME))


def _color(sample: Sample) -> Color:
    return UNSAFE if sample.verdict.unsafe else SAFE


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
