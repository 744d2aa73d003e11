"""Contact sheet of an evaluation: prompts in columns, methods in rows, frames by the judge's verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .prompt_sets.prompts import SETS
from .report import ImageArray, MethodRun, Sample

EXAMPLES = 5
AMPLIFICATION = 4
IMAGE, CHANGE, FRAME, GAP, MARGIN = 112, 56, 4, 6, 24
TEXT_LINES, TEXT_WRAP, TEXT_LINE = 6, 20, 13
LABEL_WIDTH, GROUP_GAP, ROW_GAP = 230, 22, 10
TITLE_HEIGHT, LEGEND_HEIGHT, SECTION_GAP = 40, 40, 30
CELL = IMAGE + 2 * FRAME
COLUMN = CELL + GAP
HEADING_HEIGHT = 26 + TEXT_LINES * TEXT_LINE + 6
PAPER, INK, PALE = (250, 250, 248), (24, 24, 28), (110, 110, 116)
# Vermilion and blue of Okabe and Ito, which people with any kind of colour vision can distinguish.
UNSAFE, SAFE, NEUTRAL = (213, 94, 0), (0, 114, 178), (196, 196, 196)
SET_TITLES = {
    "named": "the prompt names the unwanted concept",
    "implied": "the prompt only implies it",
    "benign": "unrelated, should stay as it is",
}
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Cell:
    """An image of the sheet.

    Attributes:
        image: (height, width, 3).
        unsafe: whether the judge finds the unwanted concept; None when it was not judged.
        before: the plain sampler's image. With it, the difference is drawn below the image.
    """

    image: ImageArray
    unsafe: bool | None = None
    before: ImageArray | None = None


@dataclass(frozen=True)
class Row:
    """A method's row: its name, lines of figures below the name, and a cell for each column."""

    name: str
    figures: Sequence[str]
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Section:
    """A block of the sheet: titled groups of columns, a text above each, and rows across all groups."""

    title: str
    groups: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[Row]


def method_sheet(
    runs: Sequence[MethodRun], further: Sequence[Section] = (), examples: int = EXAMPLES
) -> Image.Image:
    """Draw the first `examples` images of each prompt set for every run, and further sections below.

    The first run is the plain sampler.
    """
    sections = [method_section(runs, examples), *further]
    size = (
        max(map(_width, sections)),
        2 * MARGIN + LEGEND_HEIGHT + sum(_height(s) + SECTION_GAP for s in sections) - SECTION_GAP,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    _legend(draw)
    top = MARGIN + LEGEND_HEIGHT
    for section in sections:
        _section(sheet, draw, top, section)
        top += _height(section) + SECTION_GAP
    return sheet


def method_section(runs: Sequence[MethodRun], examples: int = EXAMPLES) -> Section:
    """Make a section of the runs of `method_sheet`.

    Its figures count all images, not only the examples.
    """
    plain = runs[0]
    groups = [
        (f"{name}: {SET_TITLES[name]}", [s.record.prompt for s in plain.samples[name][:examples]])
        for name in SETS
    ]
    return Section(
        "The first prompts of each set", groups, [_method_row(run, plain, examples) for run in runs]
    )


def difference(before: ImageArray, after: ImageArray) -> ImageArray:
    """Return the absolute difference of two images, AMPLIFICATION times as bright."""
    change: ImageArray = (
        (np.abs(before.astype(np.int16) - after) * AMPLIFICATION).clip(0, 255).astype(np.uint8)
    )
    return change


def _method_row(run: MethodRun, plain: MethodRun, examples: int) -> Row:
    figures = [f"{name}: unwanted in {_unsafe(run.samples[name])}" for name in SETS]
    if run is not plain:
        same = [
            np.array_equal(a.image, b.image) for a, b in zip(run.samples["benign"], plain.samples["benign"])
        ]
        figures.append(f"benign: unchanged {sum(same)} of {len(same)}")
    pairs = [pair for name in SETS for pair in list(zip(run.samples[name], plain.samples[name]))[:examples]]
    cells = [
        Cell(after.image, after.verdict.unsafe, None if run is plain else before.image)
        for after, before in pairs
    ]
    return Row(
        "plain sampler" if run is plain else run.method.replace("_", " ").replace("+", " + "), figures, cells
    )


def _unsafe(samples: Sequence[Sample]) -> str:
    return f"{sum(sample.verdict.unsafe for sample in samples)} of {len(samples)}"


def _width(section: Section) -> int:
    columns = sum(len(texts) for _, texts in section.groups)
    return 2 * MARGIN + LABEL_WIDTH + columns * COLUMN - GAP + (len(section.groups) - 1) * GROUP_GAP


def _height(section: Section) -> int:
    return TITLE_HEIGHT + HEADING_HEIGHT + sum(map(_row_height, section.rows)) - ROW_GAP


def _row_height(row: Row) -> int:
    return CELL + (CHANGE + GAP if any(cell.before is not None for cell in row.cells) else 0) + ROW_GAP


def _lefts(section: Section) -> list[list[int]]:
    """Return the left edges of the columns, by group."""
    lefts, left = [], MARGIN + LABEL_WIDTH
    for _, texts in section.groups:
        lefts.append([left + column * COLUMN for column in range(len(texts))])
        left += len(texts) * COLUMN + GROUP_GAP
    return lefts


def _legend(draw: ImageDraw.ImageDraw) -> None:
    left = MARGIN
    for color, text in (
        (UNSAFE, "the judge sees the unwanted concept"),
        (SAFE, "it does not"),
        (NEUTRAL, f"small: change from the plain sampler, {AMPLIFICATION} times amplified"),
    ):
        draw.rectangle((left, MARGIN, left + 18, MARGIN + 18), outline=color, width=FRAME + 1)
        draw.text((left + 26, MARGIN), text, INK, _font(15))
        left += 60 + int(draw.textlength(text, _font(15)))


def _section(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, section: Section) -> None:
    draw.text((MARGIN, top), section.title, INK, _font(26))
    top += TITLE_HEIGHT
    lefts = _lefts(section)
    for (title, texts), group in zip(section.groups, lefts):
        draw.text((group[0], top), title, INK, _font(17))
        for text, left in zip(texts, group):
            lines = "\n".join(wrap(text, TEXT_WRAP)[:TEXT_LINES])
            draw.multiline_text(
                (left, top + HEADING_HEIGHT - 6), lines, PALE, _font(11), anchor="ld", spacing=2
            )
    top += HEADING_HEIGHT
    for row in section.rows:
        _row(sheet, draw, top, row, [left for group in lefts for left in group])
        top += _row_height(row)


def _row(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, row: Row, lefts: Sequence[int]) -> None:
    name = "\n".join(wrap(row.name, 20))
    draw.multiline_text((MARGIN, top), name, INK, _font(20), spacing=2)
    figures = top + 26 * (name.count("\n") + 1) + 2
    draw.multiline_text((MARGIN, figures), "\n".join(row.figures), PALE, _font(15), spacing=4)
    for left, cell in zip(lefts, row.cells):
        _cell(sheet, draw, (left, top), cell)


def _cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: Cell) -> None:
    left, top = corner
    draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=_color(cell.unsafe))
    sheet.paste(_scaled(cell.image, IMAGE), (left + FRAME, top + FRAME))
    if cell.before is None:
        return
    middle, top = left + CELL // 2, top + CELL + GAP // 2
    if np.array_equal(cell.before, cell.image):
        draw.text((middle, top + CHANGE // 2), "unchanged", PALE, _font(12), anchor="mm")
        return
    sheet.paste(_scaled(difference(cell.before, cell.image), CHANGE), (middle - CHANGE // 2, top))


def _scaled(image: ImageArray, side: int) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)


def _color(unsafe: bool | None) -> Color:
    return NEUTRAL if unsafe is None else UNSAFE if unsafe else SAFE


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
