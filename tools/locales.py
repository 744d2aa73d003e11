"""Write the English texts of all nodes as the base of the translations, and bring the translations into line
with it.

`python3 dev.py make locales` writes locales/en/nodeDefs.json from the nodes' schemas. Every other language
keeps its texts. Texts of removed nodes and inputs are dropped, and texts to translate or to check again are
listed (exit code 1).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..evaluation.server import PACK_NAME, ComfyServer

LOCALES = Path(__file__).resolve().parents[1] / "locales"
BASE = "en"
FILE = "nodeDefs.json"

Texts: TypeAlias = dict[str, Any]
"""Nested dictionaries of texts, as the web interface wants them: node -> display_name, description, inputs,
outputs."""


def node_texts(info: Mapping[str, Any]) -> Texts:
    """Return the English texts of one node, from the server's description of it."""
    described: dict[str, list[Any]] = {}
    for section in ("required", "optional"):
        described |= info["input"].get(section, {})
    texts: Texts = {"display_name": info["display_name"], "description": info["description"]}
    if described:
        texts["inputs"] = {_key(name): _named(name, _tooltip(spec)) for name, spec in described.items()}
    if info["output_name"]:
        tooltips = info.get("output_tooltips") or [None] * len(info["output_name"])
        texts["outputs"] = {
            str(slot): _named(name, tooltips[slot]) for slot, name in enumerate(info["output_name"])
        }
    return texts


def _key(name: str) -> str:
    # The interface looks texts up by a path with dots, so it replaces the dots of names.
    return name.replace(".", "_")


def _tooltip(spec: Sequence[Any]) -> str | None:
    return spec[1].get("tooltip") if len(spec) > 1 else None


def _named(name: str, tooltip: str | None) -> Texts:
    return {"name": name, **({"tooltip": tooltip} if tooltip else {})}


def english(object_info: Mapping[str, Any]) -> Texts:
    """Return the English texts of all nodes of this pack, by node id."""
    own = {
        name: info for name, info in object_info.items() if info["python_module"].endswith(f".{PACK_NAME}")
    }
    return {_key(name): node_texts(own[name]) for name in sorted(own)}


def leaves(texts: Texts, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every text with its path, such as ("SafeGuidanceSafeDenoiser", "inputs", "strength",
    "tooltip")."""
    for name, value in texts.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def missing(base: Texts, translated: Texts) -> list[str]:
    """Return the paths of the base's texts that a translation lacks."""
    known = dict(leaves(translated))
    return [" / ".join(path) for path, _ in leaves(base) if not known.get(path)]


def changed(old: Texts, new: Texts) -> list[str]:
    """Return the paths of texts whose English is no longer what it was."""
    before = dict(leaves(old))
    return [" / ".join(path) for path, text in leaves(new) if path in before and before[path] != text]


def with_known(base: Texts, translated: Texts) -> Texts:
    """Fill the gaps of a translation where the same English is translated elsewhere in it: methods share
    settings."""
    english_of, known = dict(leaves(base)), dict(leaves(translated))
    memory = {english_of[path]: text for path, text in known.items() if path in english_of}
    filled: Texts = {}
    for path, text in english_of.items():
        found = known.get(path) or memory.get(text)
        if found:
            _put(filled, path, found)
    return filled


def _put(texts: Texts, path: Sequence[str], text: str) -> None:
    for name in path[:-1]:
        texts = texts.setdefault(name, {})
    texts[path[-1]] = text


def read(path: Path) -> Texts:
    """Read the texts in a file; none when there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write(path: Path, texts: Texts) -> None:
    """Write texts for people to edit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Write the base and list what the translations lack; 0 when there is nothing to translate."""
    with ComfyServer(device="cpu") as server:
        base = english(server.get_json("/object_info"))
    news = changed(read(LOCALES / BASE / FILE), base)
    for path in news:
        sys.stdout.write(f"the English changed, check the translations: {path}\n")
    write(LOCALES / BASE / FILE, base)
    gaps = 0
    for folder in sorted(path for path in LOCALES.iterdir() if path.is_dir() and path.name != BASE):
        translated = with_known(base, read(folder / FILE))
        write(folder / FILE, translated)
        for path in missing(base, translated):
            sys.stdout.write(f"{folder.name} lacks {path}\n")
            gaps += 1
    sys.stdout.write(
        f"{sum(1 for _ in leaves(base))} texts of {len(base)} nodes, {gaps} translations missing\n"
    )
    return 1 if gaps or news else 0
