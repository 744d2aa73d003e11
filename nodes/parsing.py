"""Values that people type as text: lines, lists with commas, noise levels and seeds."""

from __future__ import annotations

import re

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
"""The largest seed of the host's samplers."""


def lines_of(text: str) -> list[str]:
    """Return the lines of a text that are not empty; commas within a line stay."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def names_of(text: str) -> list[str]:
    """Return the names of a list with commas that are not empty."""
    return [name.strip() for name in text.split(",") if name.strip()]


def entries_of(text: str) -> list[str]:
    """Return the entries of a list with commas, or semicolons, that are not empty."""
    return names_of(text.replace(";", ","))


def phrases_of(text: str) -> list[str]:
    """Return the phrases of a list, separated by lines or commas, that are not empty."""
    return [phrase for part in re.split(r"[\n,]", text) if (phrase := part.strip())]


def captions_of(text: str, count: int) -> tuple[str, ...]:
    """Return a line for each of `count` images, empty where there are too few."""
    lines = [line.strip() for line in text.strip("\n").split("\n")] if text.strip() else []
    return (*lines[:count], *[""] * (count - len(lines)))


def noise_levels(text: str) -> tuple[float, ...]:
    """Read noise levels from a list with commas, highest first.

    Raises:
        ValueError: it is empty or has something that is no positive number.
    """
    try:
        levels = sorted({float(entry) for entry in entries_of(text)}, reverse=True)
    except ValueError:
        levels = []
    if not levels or not all(0 < level < 1e6 for level in levels):
        raise ValueError(
            f"'{text}' is not a list of noise levels. "
            "Write positive numbers with commas between them, such as 7, 5, 3, 2, 1."
        )
    return tuple(levels)


def seeds_of(text: str, first: int, count: int) -> list[int]:
    """Read the seeds of `count` images from a list with commas that may be too short.

    Raises:
        ValueError: something in the list is no whole number from 0 on.
    """
    given = entries_of(text)[:count]
    if not all(entry.isdecimal() and int(entry) <= LARGEST_SEED for entry in given):
        raise ValueError(
            f"'{text}' is not a list of seeds. "
            "Write whole numbers with commas between them, such as 3, 14, 15."
        )
    seeds = [int(entry) for entry in given] or [first]
    return [*seeds, *((seeds[-1] + i) % (LARGEST_SEED + 1) for i in range(1, count - len(seeds) + 1))]
