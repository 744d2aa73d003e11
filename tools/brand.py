"""Draw the pack's icon and banner for the registry: `python3 dev.py make brand`.

A path that starts in noise bends around a star, the unwanted concept of the pack's demo world. The colours
are those of Okabe and Ito, which people with any kind of colour vision can distinguish.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "brand"
ICON_SIDE, BANNER = 400, (1260, 540)
OVERSAMPLING = 4
NIGHT, ORANGE, SKY, GREEN, PAPER = (13, 33, 48), (230, 159, 0), (86, 180, 233), (0, 158, 115), (246, 246, 242)
POINTS = 5
STAR_INNER = 0.42
STEPS = 600

Point = tuple[float, float]


def star(center: Point, radius: float) -> list[Point]:
    """Return the corners of an upright star."""
    corners = []
    for corner in range(2 * POINTS):
        angle = math.pi * corner / POINTS - math.pi / 2
        length = radius if corner % 2 == 0 else radius * STAR_INNER
        corners.append((center[0] + length * math.cos(angle), center[1] + length * math.sin(angle)))
    return corners


def path_around(start: Point, end: Point, center: Point, radius: float) -> Iterator[Point]:
    """Yield points of a line from start to end that bends around the disc of `radius` at the centre."""
    for step in range(STEPS + 1):
        share = step / STEPS
        x, y = start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])
        away_x, away_y = x - center[0], y - center[1]
        distance = math.hypot(away_x, away_y) or 1e-9
        # A Gaussian push: full at the centre, nearly zero at twice the radius.
        pushed = distance + radius * math.exp(-((distance / radius) ** 2) / 2)
        yield center[0] + away_x / distance * pushed, center[1] + away_y / distance * pushed


def emblem(draw: ImageDraw.ImageDraw, corner: Point, side: float) -> None:
    """Draw the motif in a square."""

    def at(x: float, y: float) -> Point:
        return corner[0] + x * side, corner[1] + y * side

    center, radius = at(0.53, 0.55), 0.27 * side
    draw.ellipse(
        [*at(0.53 - 0.2, 0.55 - 0.2), *at(0.53 + 0.2, 0.55 + 0.2)], outline=SKY, width=round(0.008 * side)
    )
    draw.polygon(star(center, 0.15 * side), fill=ORANGE)
    half = 0.0175 * side
    # Discs, because the joints of a wide polyline are visible.
    for x, y in path_around(at(0.14, 0.84), at(0.86, 0.13), center, radius):
        draw.ellipse((x - half, y - half, x + half, y + half), fill=PAPER)
    rng = random.Random(1)
    for _ in range(46):
        x, y, size = rng.gauss(0.15, 0.05), rng.gauss(0.84, 0.045), rng.uniform(0.006, 0.013)
        draw.ellipse(
            [*at(x - size, y - size), *at(x + size, y + size)], fill=rng.choice((SKY, PAPER, ORANGE, GREEN))
        )
    draw.ellipse([*at(0.86 - 0.065, 0.13 - 0.065), *at(0.86 + 0.065, 0.13 + 0.065)], fill=GREEN)


def icon() -> Image.Image:
    """Draw the icon, a square with round corners."""
    side = ICON_SIDE * OVERSAMPLING
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, side - 1, side - 1), radius=side // 6, fill=NIGHT)
    emblem(draw, (0.0, 0.0), side)
    return image.resize((ICON_SIDE, ICON_SIDE), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """Draw the banner, the motif beside the name, 21 to 9."""
    width, height = BANNER[0] * OVERSAMPLING, BANNER[1] * OVERSAMPLING
    image = Image.new("RGB", (width, height), NIGHT)
    draw = ImageDraw.Draw(image)
    emblem(draw, (height * 0.06, height * 0.04), height * 0.92)
    draw.text(
        (height * 1.06, height * 0.46),
        "Safe Guidance",
        PAPER,
        ImageFont.load_default(size=height // 6.2),
        anchor="ls",
    )
    for line, text in enumerate(
        ("keeps a diffusion model away from", "what you do not want, while it samples")
    ):
        position = (height * 1.065, height * (0.58 + 0.085 * line))
        draw.text(position, text, SKY, ImageFont.load_default(size=height // 16), anchor="ls")
    return image.resize(BANNER, Image.Resampling.LANCZOS)


def main(argv: Sequence[str]) -> int:
    """Write both images."""
    argparse.ArgumentParser(prog="dev.py make brand", description=(__doc__ or "").splitlines()[0]).parse_args(
        argv
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, image in (("icon", icon()), ("banner", banner().quantize(128))):
        path = FOLDER / f"{name}.png"
        image.save(path, optimize=True)
        sys.stdout.write(f"assets/brand/{path.name}  {path.stat().st_size / 1000:.0f} kB\n")
    return 0
