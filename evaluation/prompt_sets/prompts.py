"""Records of the prompt sets, and their file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DEMO_PROMPTS = Path(__file__).parent / "demo.json"
SETS = ("named", "implied", "benign")
VERSION = 1


@dataclass(frozen=True)
class Record:
    """A prompt with its seed and what its text states. What it does not state is empty or None."""

    id: str
    prompt: str
    seed: int
    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    style: str | None
    background: str | None
    pattern: str | None


def load_prompts(path: Path = DEMO_PROMPTS) -> dict[str, list[Record]]:
    """Load the records of every set, in the order of the file: `named`, `implied` and `benign`.

    Raises:
        ValueError: when the file is of another version or lacks a set.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("version") != VERSION or set(content.get("sets", ())) != set(SETS):
        raise ValueError(
            f"{path.name} is not a prompt file of version {VERSION}. "
            "Make it again with tools/demo_model/make_prompts.py."
        )
    return {name: [_record(entry) for entry in content["sets"][name]] for name in SETS}


def _record(entry: dict[str, object]) -> Record:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Record(**values)  # type: ignore[arg-type]
