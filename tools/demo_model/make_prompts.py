"""Write the fixed prompts on which every method is measured: `python tools/demo_model/make_prompts.py`.

Three sets: the unsafe concept by name, the concept only implied, and benign prompts. Attributes are sampled
without replacement, so that the first prompts of a set represent all of it.
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
OUTPUT = Path(__file__).resolve().parents[2] / "evaluation" / "prompt_sets" / "demo.json"
SAFE_SHAPES = tuple(name for name in world.SHAPES if name != world.CONCEPT)

Item = TypeVar("Item")


def without_replacement(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """Yield the items in random order, endlessly, each once per round."""
    while True:
        yield from rng.sample(items, len(items))


class SceneSource:
    """Generator of scenes with evenly distributed styles, backgrounds, patterns, places and relations."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._count = 0
        self._styles = without_replacement(world.STYLES, rng)
        self._backgrounds = without_replacement(tuple(world.BACKGROUNDS), rng)
        self._patterns = without_replacement(world.PATTERNS, rng)
        self._places = without_replacement(tuple(world.PLACES), rng)
        self._arrangements = without_replacement(
            [(relation, swap) for relation in world.RELATIONS for swap in (False, True)], rng
        )
        self._colors = without_replacement(tuple(world.COLORS), rng)
        self._safe_shapes = without_replacement(SAFE_SHAPES, rng)

    def scene(self, shape: str | None) -> world.Scene:
        """Return a scene with `shape`, or without the concept.

        Every third scene has two shapes, in either order.
        """
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
        """Choose a word for each shape, mostly its first one."""
        words = {name: self._word(world.SHAPE_WORDS[name]) for name in SAFE_SHAPES}
        return words | {world.CONCEPT: concept_word}

    def _word(self, words: Sequence[str]) -> str:
        return (
            self.rng.choice(words[1:]) if len(words) > 1 and self.rng.random() < SYNONYM_SHARE else words[0]
        )


def _shape(name: str, color: str) -> world.Shape:
    return world.Shape(name, color, 0.0, 0.0, 1.0, 0.0)


def described(
    scene: world.Scene, source: SceneSource, concept_word: str = world.CONCEPT
) -> dict[str, object]:
    """Describe a scene by its prompt and what the prompt states."""
    prompt = world.write_caption(scene, source.rng, complete=True, words=source.words(concept_word))
    return {
        "prompt": prompt,
        "shapes": [shape.name for shape in scene.shapes],
        "colors": [shape.color for shape in scene.shapes],
        "style": scene.style,
        "background": scene.background,
        "pattern": scene.pattern if scene.pattern in prompt else None,
    }


def phrase(text: str) -> dict[str, object]:
    """Describe a prompt that implies a whole scene and states at most its style."""
    style = next((name for name in world.STYLES if f"{name} style" in text), None)
    return {"prompt": text, "shapes": [], "colors": [], "style": style, "background": None, "pattern": None}


def named(rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield prompts that name the concept."""
    source = SceneSource(rng)
    while True:
        yield described(source.scene(world.CONCEPT), source)


def implied(rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield prompts that imply the concept: three by a word, then one by a phrase."""
    source = SceneSource(rng)
    words, phrases = (
        without_replacement(world.IMPLYING_WORDS, rng),
        without_replacement(world.IMPLYING_PHRASES, rng),
    )
    while True:
        for _ in range(3):
            yield described(source.scene(world.CONCEPT), source, next(words))
        yield phrase(next(phrases))


def benign(rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield prompts without the concept."""
    source = SceneSource(rng)
    while True:
        yield described(source.scene(None), source)


def records(
    name: str, prompts: Callable[[random.Random], Iterator[dict[str, object]]], first_seed: int
) -> list[dict[str, object]]:
    """Make the records of a set, with seeds that no other record has."""
    made = prompts(random.Random(name))
    return [{"id": f"{name}-{i:03d}", "seed": first_seed + i, **next(made)} for i in range(PER_SET)]


def main(argv: Sequence[str]) -> int:
    """Write the prompt file."""
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
