"""Subjects, styles and grounds of the artwork world, each with the words that captions use for it."""

from __future__ import annotations

from dataclasses import dataclass

WEAPONS, SKULLS, SMOKING = "weapons", "skulls", "smoking"
CONCEPTS = (WEAPONS, SKULLS, SMOKING)
"""Categories that play unwanted concepts. Every other category is harmless."""


@dataclass(frozen=True)
class Subject:
    """One emoji of the world.

    Attributes:
        code: its code point in lower-case hexadecimal, which is its name in every artwork package.
        name: its label. It is also the first word that captions use for it.
        category: one of CONCEPTS or a harmless category.
        synonyms: further words that captions use for it.
    """

    code: str
    name: str
    category: str
    synonyms: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Return every word that names the subject, its label first."""
        return (self.name, *self.synonyms)


_TABLE: dict[str, tuple[tuple[str, ...], ...]] = {
    WEAPONS: (
        ("1f5e1", "dagger", "short blade"),
        ("1f52a", "kitchen knife", "knife"),
        ("1f4a3", "bomb", "explosive"),
        ("2694", "crossed swords", "swords"),
        ("1f9e8", "firecracker", "stick of dynamite"),
        ("1f3f9", "bow and arrow", "archer's bow"),
        ("1fa93", "axe", "hatchet"),
        ("1f52b", "pistol", "toy gun"),
    ),
    SKULLS: (
        ("1f480", "skull", "death's head"),
        ("2620", "skull and crossbones"),
    ),
    SMOKING: (("1f6ac", "cigarette", "lit cigarette"),),
    "food": (
        ("1f34e", "red apple", "apple"),
        ("1f34c", "banana"),
        ("1f347", "grapes"),
        ("1f353", "strawberry"),
        ("1f349", "watermelon"),
        ("1f34b", "lemon"),
        ("1f352", "cherries"),
        ("1f34d", "pineapple"),
        ("1f955", "carrot"),
        ("1f951", "avocado"),
        ("1f344", "mushroom", "toadstool"),
        ("1f950", "croissant"),
        ("1f968", "pretzel"),
        ("1f9c0", "cheese"),
        ("1f355", "pizza", "slice of pizza"),
        ("1f354", "hamburger", "burger"),
        ("1f369", "doughnut", "donut"),
        ("1f382", "birthday cake", "cake"),
        ("1f366", "ice cream", "ice cream cone"),
        ("2615", "coffee", "cup of coffee"),
    ),
    "animals": (
        ("1f431", "cat", "kitten"),
        ("1f436", "dog", "puppy"),
        ("1f430", "rabbit", "bunny"),
        ("1f98a", "fox"),
        ("1f43c", "panda"),
        ("1f438", "frog"),
        ("1f435", "monkey"),
        ("1f989", "owl"),
        ("1f427", "penguin"),
        ("1f986", "duck"),
        ("1f41d", "bee", "honeybee"),
        ("1f98b", "butterfly"),
        ("1f41e", "ladybug", "ladybird"),
        ("1f40c", "snail"),
        ("1f422", "turtle", "tortoise"),
        ("1f420", "fish", "tropical fish"),
        ("1f433", "whale"),
        ("1f419", "octopus"),
        ("1f980", "crab"),
        ("1f418", "elephant"),
    ),
    "vehicles": (
        ("1f697", "car", "automobile"),
        ("1f68c", "bus"),
        ("1f692", "fire engine", "fire truck"),
        ("1f69c", "tractor"),
        ("1f6b2", "bicycle", "bike"),
        ("1f682", "locomotive", "steam train"),
        ("2708", "airplane", "plane"),
        ("1f681", "helicopter"),
        ("1f680", "rocket"),
        ("26f5", "sailboat"),
    ),
    "objects": (
        ("1f528", "hammer"),
        ("1f527", "wrench", "spanner"),
        ("2702", "scissors"),
        ("1f511", "key"),
        ("1f512", "padlock", "lock"),
        ("1f4a1", "light bulb", "lamp"),
        ("1f4f7", "camera"),
        ("23f0", "alarm clock", "clock"),
        ("2602", "umbrella"),
        ("1f3b8", "guitar"),
        ("1f3ba", "trumpet"),
        ("1f941", "drum"),
        ("1f514", "bell"),
        ("1f388", "balloon"),
        ("1f381", "gift", "present"),
        ("1f451", "crown"),
        ("1f9f8", "teddy bear"),
        ("1f3a9", "top hat", "hat"),
        ("1f3e0", "house", "cottage"),
    ),
    "plants": (
        ("1f33b", "sunflower"),
        ("1f339", "rose"),
        ("1f337", "tulip"),
        ("1f335", "cactus"),
        ("1f332", "pine tree", "evergreen tree"),
        ("1f334", "palm tree"),
        ("1f341", "maple leaf"),
    ),
    "sports": (
        ("26bd", "football", "soccer ball"),
        ("1f3c0", "basketball"),
        ("26be", "baseball"),
        ("1f94a", "boxing glove"),
        ("1f3c6", "trophy", "golden cup"),
    ),
    "seasons": (
        ("26c4", "snowman"),
        ("1f383", "pumpkin", "jack-o-lantern"),
        ("1f47b", "ghost"),
    ),
}
SUBJECTS = tuple(
    Subject(code, words[0], category, words[1:]) for category, rows in _TABLE.items() for code, *words in rows
)
SUBJECT = {subject.name: subject for subject in SUBJECTS}
"""The subjects by name."""
NO_ARTICLE = frozenset({"grapes", "cherries", "cheese", "crossed swords", "swords", "scissors"})
"""Words that captions use without an article."""

STYLES: dict[str, tuple[str, ...]] = {
    "3d": ("3d style", "in 3d"),
    "flat": ("flat style", "flat design"),
    "noto": ("noto style", "by noto"),
    "twemoji": ("twemoji style", "by twemoji"),
}
"""The artists' sets, and the words that captions use for each."""
DEFAULT_STYLE = "3d"
"""The style of most scenes, which half of their captions leave out."""

COLORS: dict[str, tuple[float, float, float]] = {
    "white": (0.96, 0.96, 0.94),
    "grey": (0.58, 0.60, 0.63),
    "black": (0.10, 0.10, 0.13),
    "blue": (0.27, 0.50, 0.80),
    "teal": (0.16, 0.58, 0.56),
    "green": (0.45, 0.70, 0.35),
    "yellow": (0.96, 0.81, 0.36),
    "pink": (0.94, 0.68, 0.76),
    "purple": (0.52, 0.38, 0.70),
    "brown": (0.54, 0.38, 0.27),
}
"""Colours of plain and graded grounds, in [0, 1]."""
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "grass": ("on grass", "on a lawn"),
    "brick": ("on a brick wall", "on bricks"),
    "gravel": ("on gravel", "on pebbles"),
    "wood": ("on a wooden table", "on wood"),
    "space": ("in space", "in deep space"),
}
"""Photographic grounds, and the phrases that captions use for each."""
