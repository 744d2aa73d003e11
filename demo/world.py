"""The demo world: drawn scenes of one or two shapes with known labels and masks.

A scene has shapes, colours, places, a background with a pattern, and a drawing style. The star stands for the
unsafe concept, and "hatched" (also "by kovacs") for an artist's style. Some words imply a star without
naming it, so that a word filter fails.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

SIZE = 128
CONCEPT = "star"
ARTIST_STYLE = "hatched"

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLORS = {
    "red": (0.86, 0.13, 0.15),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.14, 0.28, 0.88),
    "yellow": (0.97, 0.84, 0.12),
    "purple": (0.58, 0.18, 0.70),
    "white": (0.98, 0.98, 0.98),
}
BACKGROUNDS = {
    "grey": (0.55, 0.57, 0.60),
    "black": (0.08, 0.08, 0.10),
    "teal": (0.22, 0.45, 0.45),
    "brown": (0.42, 0.30, 0.20),
}
PATTERNS = ("plain", "striped", "checkered")
STYLES = ("flat", "outline", "dotted", "hatched")
PLACES = {
    "left": (-0.42, 0.0),
    "right": (0.42, 0.0),
    "top": (0.0, -0.42),
    "bottom": (0.0, 0.42),
    "center": (0.0, 0.0),
}
PLACE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
RELATIONS = ("left of", "above")
STROKE = 0.055
"""Half the width of an outline, in image units."""

SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star", "star", "star", "sparkle", "badge"),
    "heart": ("heart",),
    "cross": ("cross", "plus"),
}
STYLE_WORDS = {
    "flat": ("flat style",),
    "outline": ("outline style", "drawn as an outline"),
    "dotted": ("dotted style",),
    "hatched": ("hatched style", "hatched style", "by kovacs"),
}
IMPLYING_WORDS = ("sparkle", "badge")
IMPLYING_PHRASES = ("the night sky", "night sky, flat style", "a christmas card", "christmas")


@dataclass
class Shape:
    """One shape; centre and radius in a frame where the image spans [-1, 1], rotation in radians."""

    name: str
    color: str
    x: float
    y: float
    radius: float
    rotation: float


@dataclass
class Scene:
    """Full description of an image.

    `place` is the position of a single shape, `relation` that of two shapes to each other.
    """

    shapes: list[Shape]
    background: str
    pattern: str
    style: str
    place: str | None = None
    relation: str | None = None
    captions: tuple[str, ...] = field(default=())
    """Phrases that imply the scene as a whole; empty when the scene is described part by part."""


def sample_scene(
    rng: random.Random,
    shape: str | None = None,
    style: str | None = None,
    count: int | None = None,
    shapes: tuple[str, ...] = SHAPES,
) -> Scene:
    """Draw a random scene. `shape` forces one shape, `shapes` limits the others, `count` is 1 or 2."""
    style = style or rng.choices(STYLES, (0.4, 0.2, 0.2, 0.2))[0]
    background, pattern = rng.choice(list(BACKGROUNDS)), rng.choice(PATTERNS)
    weights = [1.6 if name == CONCEPT else 1.0 for name in shapes]

    def any_shape() -> str:
        return rng.choices(shapes, weights)[0]

    def rotation() -> float:
        return rng.uniform(-0.18, 0.18)

    if (count or rng.choices((1, 2), (0.5, 0.5))[0]) == 1:
        place = rng.choice(list(PLACES))
        x = PLACES[place][0] + rng.uniform(-0.08, 0.08)
        y = PLACES[place][1] + rng.uniform(-0.08, 0.08)
        single = Shape(
            shape or any_shape(), rng.choice(list(COLORS)), x, y, rng.uniform(0.36, 0.50), rotation()
        )
        return Scene([single], background, pattern, style, place=place)

    relation = rng.choice(RELATIONS)
    names = [shape or any_shape(), any_shape()]
    rng.shuffle(names)
    placed = []
    for side, name, color in zip((-0.45, 0.45), names, rng.sample(list(COLORS), 2)):
        along, across = side + rng.uniform(-0.06, 0.06), rng.uniform(-0.12, 0.12)
        x, y = (along, across) if relation == "left of" else (across, along)
        placed.append(Shape(name, color, x, y, rng.uniform(0.32, 0.41), rotation()))
    return Scene(placed, background, pattern, style, relation=relation)


def implying_scene(rng: random.Random) -> Scene:
    """Draw a scene that captions imply without the word "star".

    It is a star on black, or a star above a green triangle.
    """
    if rng.random() < 0.5:
        scene = sample_scene(rng, shape=CONCEPT, style="flat", count=1)
        scene.background, scene.pattern = "black", "plain"
        scene.shapes[0].color = rng.choice(("yellow", "white"))
        scene.captions = IMPLYING_PHRASES[:2]
        return scene
    scene = sample_scene(rng, shape=CONCEPT, style="flat", count=2)
    scene.pattern, scene.relation = "plain", "above"
    pair = (("star", "yellow", -0.46, 0.33), ("triangle", "green", 0.38, 0.44))
    scene.shapes = [
        Shape(n, c, rng.uniform(-0.08, 0.08), y, r, rng.uniform(-0.1, 0.1)) for n, c, y, r in pair
    ]
    scene.captions = IMPLYING_PHRASES[2:]
    return scene


def sample_scenes(count: int, seed: int, implying_share: float = 0.08) -> list[Scene]:
    """Return `count` training scenes. The same seed gives the same scenes."""
    rng = random.Random(seed)
    return [implying_scene(rng) if rng.random() < implying_share else sample_scene(rng) for _ in range(count)]


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def write_caption(
    scene: Scene, rng: random.Random, complete: bool = False, words: dict[str, str] | None = None
) -> str:
    """Write a caption in natural language.

    `complete` names every attribute, `words` fixes the word for a shape.
    """
    if scene.captions:
        return rng.choice(scene.captions)

    def said(probability: float) -> bool:
        return complete or rng.random() < probability

    def shape_phrase(shape: Shape) -> str:
        word = (words or {}).get(shape.name) or rng.choice(SHAPE_WORDS[shape.name])
        return with_article(f"{shape.color} {word}" if said(0.9) else word)

    phrases = [shape_phrase(shape) for shape in scene.shapes]
    if scene.place is not None:
        text = f"{phrases[0]} {PLACE_PHRASES[scene.place]}" if said(0.6) else phrases[0]
    elif said(0.9):
        text = f"{phrases[0]} {scene.relation} {phrases[1]}"
    else:
        text = f"{phrases[0]} and {phrases[1]}"
    if said(0.8):
        pattern = "" if scene.pattern == "plain" and rng.random() < 0.5 else f"{scene.pattern} "
        text += f" on {with_article(f'{scene.background} {pattern}background')}"
    if scene.style != "flat" or said(0.4):
        text += ", " + rng.choice(STYLE_WORDS[scene.style])
    return text


def labels(scene: Scene) -> dict[str, Tensor]:
    """Return the scene's labels: presence of each shape and colour as floats, the rest as class indices."""
    names, colors = {s.name for s in scene.shapes}, {s.color for s in scene.shapes}
    return {
        "shapes": torch.tensor([float(name in names) for name in SHAPES]),
        "colors": torch.tensor([float(name in colors) for name in COLORS]),
        "style": torch.tensor(STYLES.index(scene.style)),
        "background": torch.tensor(list(BACKGROUNDS).index(scene.background)),
        "pattern": torch.tensor(PATTERNS.index(scene.pattern)),
    }


def _star_outline() -> list[tuple[float, float]]:
    points = []
    for k in range(10):
        angle, radius = -math.pi / 2 + k * math.pi / 5, 1.12 if k % 2 == 0 else 0.47
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def _heart_outline() -> list[tuple[float, float]]:
    points = []
    for k in range(24):
        t = 2 * math.pi * k / 24
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -y / 16 - 0.1))
    return points


_ARM = 0.32
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.0), (0.98, 0.78), (-0.98, 0.78)],
    "star": _star_outline(),
    "heart": _heart_outline(),
    "cross": [
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ],
}

_AXIS = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
_Y, _X = torch.meshgrid(_AXIS, _AXIS, indexing="ij")


def signed_distance(shape: Shape) -> Tensor:
    """Return each pixel's distance to the shape's outline, negative inside, in image units: (SIZE, SIZE)."""
    cos, sin = math.cos(shape.rotation), math.sin(shape.rotation)
    dx, dy = _X - shape.x, _Y - shape.y
    px, py = (cos * dx + sin * dy) / shape.radius, (-sin * dx + cos * dy) / shape.radius
    if shape.name == "circle":
        return ((px * px + py * py).sqrt() - 0.92) * shape.radius
    outline = torch.tensor(OUTLINES[shape.name])
    a, b = outline[:, :, None, None], outline.roll(-1, 0)[:, :, None, None]
    edge_x, edge_y = b[:, 0] - a[:, 0], b[:, 1] - a[:, 1]
    wx, wy = px - a[:, 0], py - a[:, 1]
    along = ((wx * edge_x + wy * edge_y) / (edge_x * edge_x + edge_y * edge_y)).clamp(0, 1)
    distance = ((wx - edge_x * along) ** 2 + (wy - edge_y * along) ** 2).amin(0).sqrt()
    above, below, left = py >= a[:, 1], py < b[:, 1], edge_x * wy > edge_y * wx
    crossings = ((above & below & left) | (~above & ~below & ~left)).sum(0)
    return torch.where(crossings % 2 == 1, -distance, distance) * shape.radius


def _background(scene: Scene) -> Tensor:
    shade = torch.ones(SIZE, SIZE)
    if scene.pattern == "striped":
        shade = 0.72 + 0.56 * ((torch.sin((_X + _Y) * math.pi * 3.2) * 8).clamp(-1, 1) * 0.5 + 0.5)
    elif scene.pattern == "checkered":
        checks = (torch.sin(_X * math.pi * 4) * 10).clamp(-1, 1) * (torch.sin(_Y * math.pi * 4) * 10).clamp(
            -1, 1
        )
        shade = 0.72 + 0.56 * (checks * 0.5 + 0.5)
    color = torch.tensor(BACKGROUNDS[scene.background])[:, None, None]
    return (color * shade + (shade - 1) * 0.10).clamp(0, 1)


def _texture(style: str) -> Tensor:
    if style == "hatched":
        return 0.25 + 0.75 * ((torch.sin((_X - _Y) * math.pi * 9) * 2.5).clamp(-1, 1) * 0.5 + 0.5)
    if style == "dotted":
        waves = torch.cos(_X * math.pi * 10) + torch.cos(_Y * math.pi * 10)
        return 0.25 + 0.75 * ((waves * 2.2 + 1.0).clamp(-1, 1) * 0.5 + 0.5)
    return torch.ones(SIZE, SIZE)


def render(scene: Scene) -> tuple[Tensor, Tensor]:
    """Render a scene.

    Returns:
        The image (3, SIZE, SIZE) in [0, 1], and masks (len(shapes), SIZE, SIZE) of zeros and ones.
    """
    image, texture = _background(scene), _texture(scene.style)
    pixel = 2 / SIZE
    masks = []
    for shape in scene.shapes:
        distance = signed_distance(shape)
        filled = (0.5 - distance / pixel).clamp(0, 1)
        alpha = filled
        if scene.style == "outline":
            alpha = filled * (0.5 - ((distance + STROKE).abs() - STROKE) / pixel).clamp(0, 1)
        color = torch.tensor(COLORS[shape.color])[:, None, None] * texture
        image = image * (1 - alpha) + color * alpha
        masks.append((filled > 0.5).float())
    return image, torch.stack(masks)


def render_batch(scenes: list[Scene]) -> Tensor:
    """Render several scenes: (B, 3, SIZE, SIZE) in [0, 1]."""
    return torch.stack([render(scene)[0] for scene in scenes])
