"""Make the README's image from the demonstration's images: `dev.py demo`, then `dev.py make overview`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"none": "plain", "safe_denoiser": "Safe Denoiser", "stg": "STG", "dag": "DAG"}
COLUMNS = (
    "named-002",
    "named-003",
    "named-005",
    "implied-001",
    "implied-002",
    "implied-003",
    "benign-001",
    "benign-002",
)
HEADINGS = {
    "named-002": "the prompt names a star",
    "implied-001": "the prompt implies one",
    "benign-001": "nothing to do with it",
}
SIDE, GAP, LEFT, TOP = 112, 6, 122, 26
PAPER, INK = (246, 246, 242), (13, 33, 48)


def overview(images: Path) -> Image.Image:
    """Draw a row per method and a column per prompt. Raises FileNotFoundError when an image is missing."""
    size = (LEFT + len(COLUMNS) * (SIDE + GAP) + GAP, TOP + len(ROWS) * (SIDE + GAP) + GAP)
    sheet, font = Image.new("RGB", size, PAPER), ImageFont.load_default(15)
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(COLUMNS):
        x = LEFT + column * (SIDE + GAP)
        draw.text((x, 5), HEADINGS.get(prompt, ""), INK, font)
        for row, method in enumerate(ROWS):
            with Image.open(images / method / f"{prompt}.png") as image:
                sheet.paste(
                    image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, TOP + row * (SIDE + GAP))
                )
    for row, title in enumerate(ROWS.values()):
        draw.text((GAP, TOP + row * (SIDE + GAP) + SIDE // 2 - 9), title, INK, font)
    return sheet


def main(argv: Sequence[str]) -> int:
    """Write docs/overview.png from a demonstration's folder."""
    parser = argparse.ArgumentParser(prog="dev.py make overview", description=__doc__)
    parser.add_argument(
        "--demo",
        type=Path,
        default=Path("demo_output"),
        help="folder of the demonstration (default: %(default)s)",
    )
    image = overview(parser.parse_args(argv).demo / "images")
    image.quantize(256).save(ROOT / "docs" / "overview.png", optimize=True)
    return 0
