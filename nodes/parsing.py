"""Values that people type as text: lines, lists with commas, noise levels and seeds."""

from __future__ import annotations

import re

from ..reports.plain_text import short

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
"""The largest seed of the host's samplers."""
MOST_LEVELS = 100
"""Most noise levels in a list. Every one costs model calls, and a handful is usual."""
LONGEST_LIST = 100_000
"""Most characters of a list."""
LONGEST_NUMBER = 40
"""Most characters of one number. Python takes quadratic time for numbers of many digits."""


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
        ValueError: it is empty, has something that is no positive number, or more than MOST_LEVELS levels.
    """
    entries = entries_of(text[:LONGEST_LIST])
    try:
        levels = sorted({_number(entry) for entry in entries[: MOST_LEVELS + 1]}, reverse=True)
    except ValueError:
        levels = []
    if len(entries) > MOST_LEVELS:
        raise ValueError(
            f"The list of noise levels has more than {MOST_LEVELS} entries. "
            "Write fewer, such as 7, 5, 3, 2, 1."
        )
    if not levels or not all(0 < level < 1e6 for level in levels):
        raise ValueError(
            f"'{short(text)}' is not a list of noise levels. "
            "Write positive numbers with commas between them, such as 7, 5, 3, 2, 1."
        )
    return tuple(levels)


def _number(entry: str) -> float:
    """Return the number that an entry of a list writes.

    Raises:
        ValueError: it writes none.
    """
    if len(entry) > LONGEST_NUMBER or "_" in entry:
        raise ValueError("not a number")
    return float(entry)


def seeds_of(text: str, first: int, count: int) -> list[int]:
    """Read the seeds of `count` images from a list with commas that may be too short.

    Raises:
        ValueError: something in the list is no whole number from 0 on.
    """
    given = entries_of(text[:LONGEST_LIST])[:count]
    if not all(_is_seed(entry) for entry in given):
        raise ValueError(
            f"'{short(text)}' is not a list of seeds. "
            "Write whole numbers with commas between them, such as 3, 14, 15."
        )
    seeds = [int(entry) for entry in given] or [first]
    return [*seeds, *((seeds[-1] + i) % (LARGEST_SEED + 1) for i in range(1, count - len(seeds) + 1))]


def _is_seed(entry: str) -> bool:
    return len(entry) <= LONGEST_NUMBER and entry.isdecimal() and int(entry) <= LARGEST_SEED
