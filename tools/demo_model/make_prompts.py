"""Write the fixed prompts on which every method is measured: `python tools/demo_model/make_prompts.py`.

Three sets: the unsafe concept by name, the concept only implied, and benign prompts. Attributes are dealt
like cards, so that every prefix of a set is a fair sample of it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import world

SETS = ("named", "implied", "benign")
PER_SET = 200
SYNONYM_SHARE = 0.15
OUTPUT = Path(__file__).resolve().parents[2] / "evaluation" / "prompts" / "demo.json"
SAFE_SHAPES = tuple(name for name in world.SHAPES if name != world.CONCEPT)

Item = TypeVar("Item")


def dealt(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """Yield the items in random order, again and again, each once per round."""
    while True:
        yield from rng.sample(items, len(items))


class Dealer:
    """Deals scenes with evenly spread styles, backgrounds, patterns, places and relations."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._count = 0
        self._styles = dealt(world.STYLES, rng)
        self._backgrounds = dealt(tuple(world.BACKGROUNDS), rng)
        self._patterns = dealt(world.PATTERNS, rng)
        self._places = dealt(tuple(world.PLACES), rng)
        self._arrangements = dealt(
            [(relation, swap) for relation in world.RELATIONS for swap in (False, True)], rng
        )
        self._colors = dealt(tuple(world.COLORS), rng)
        self._safe_shapes = dealt(SAFE_SHAPES, rng)

    def scene(self, shape: str | None) -> world.Scene:
        """Return a scene with `shape`, or with shapes other than the concept. Every third has two shapes."""
        self._count += 1
        style, background, pattern = next(self._styles), next(self._backgrounds), next(self._patterns)
        first = shape or next(self._safe_shapes)
        color = next(self._colors)
        if self._count % 3:
            return world.Scene([_shape(first, color)], background, pattern, style, place=next(self._places))
        relation, swap = next(self._arrangements)
        second = next(name for name in self._safe_shapes if name != first)
        shapes = [_shape(first, color), _shape(second, next(c for c in self._colors if c != color))]
        return world.Scene(shapes[::-1] if swap else shapes, background, pattern, style, relation=relation)

    def words(self, concept_word: str) -> dict[str, str]:
        """Choose a word for each shape: mostly the first one that the world knows."""
        words = {name: self._word(world.SHAPE_WORDS[name]) for name in SAFE_SHAPES}
        return words | {world.CONCEPT: concept_word}

    def _word(self, words: Sequence[str]) -> str:
        return (
            self.rng.choice(words[1:]) if len(words) > 1 and self.rng.random() < SYNONYM_SHARE else words[0]
        )


def _shape(name: str, color: str) -> world.Shape:
    return world.Shape(name, color, 0.0, 0.0, 1.0, 0.0)


def described(scene: world.Scene, dealer: Dealer, concept_word: str = world.CONCEPT) -> dict[str, object]:
    """Return the prompt of a scene and the facts it states."""
    prompt = world.write_caption(scene, dealer.rng, complete=True, words=dealer.words(concept_word))
    return {
        "prompt": prompt,
        "shapes": [shape.name for shape in scene.shapes],
        "colors": [shape.color for shape in scene.shapes],
        "style": scene.style,
        "background": scene.background,
        "pattern": scene.pattern if scene.pattern in prompt else None,
    }


def phrase(text: str) -> dict[str, object]:
    """Return a prompt that implies a scene and states almost nothing."""
    style = next((name for name in world.STYLES if f"{name} style" in text), None)
    return {"prompt": text, "shapes": [], "colors": [], "style": style, "background": None, "pattern": None}


def named(rng: random.Random) -> Iterator[dict[str, object]]:
    dealer = Dealer(rng)
    while True:
        yield described(dealer.scene(world.CONCEPT), dealer)


def implied(rng: random.Random) -> Iterator[dict[str, object]]:
    dealer = Dealer(rng)
    words, phrases = dealt(world.IMPLYING_WORDS, rng), dealt(world.IMPLYING_PHRASES, rng)
    while True:
        for _ in range(3):
            yield described(dealer.scene(world.CONCEPT), dealer, next(words))
        yield phrase(next(phrases))


def benign(rng: random.Random) -> Iterator[dict[str, object]]:
    dealer = Dealer(rng)
    while True:
        yield described(dealer.scene(None), dealer)


def records(
    name: str, prompts: Callable[[random.Random], Iterator[dict[str, object]]], first_seed: int
) -> list[dict[str, object]]:
    """Return the records of a set, with seeds that no other record has."""
    source = prompts(random.Random(name))
    return [{"id": f"{name}-{i:03d}", "seed": first_seed + i, **next(source)} for i in range(PER_SET)]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args(argv).output
    makers = zip(SETS, (named, implied, benign))
    sets = {name: records(name, maker, 1000 * (i + 1)) for i, (name, maker) in enumerate(makers)}
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(entry) for entry in entries) + "\n]"
        for name, entries in sets.items()
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        '{"version": 1, "sets": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8", newline="\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
