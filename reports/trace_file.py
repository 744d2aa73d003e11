"""Files that hold a trace: a PNG that Save Image with Safety Trace wrote, or the trace's JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from ..formats import finite_json
from .trace import Trace

METADATA = "safety_trace"
"""Key of the trace among a PNG's texts."""
SUFFIXES = (".png", ".json")
MAX_JSON_BYTES = 2**25
"""A trace of 1,000 calls and 10 methods has about 2 MB."""
MAX_PNG_BYTES = 2**28


def read_trace(path: Path) -> Trace:
    """Read the trace in a PNG or JSON file.

    Raises:
        ValueError: the file holds no trace of this version, or is too large or damaged.
        OSError: the file cannot be opened.
    """
    size, most = path.stat().st_size, MAX_PNG_BYTES if _is_png(path) else MAX_JSON_BYTES
    if size > most:
        raise ValueError(f"{path.name} has {size} bytes. A file with a trace may have {most} at most.")
    text = _text_of_png(path) if _is_png(path) else path.read_bytes().decode("utf-8", "replace")
    return trace_from_json(text, path.name)


def trace_from_json(text: str, name: str) -> Trace:
    """Read a trace from JSON; `name` says in messages where it comes from.

    Raises:
        ValueError: it is no JSON, or not that of a trace of this version.
    """
    try:
        content: Any = finite_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} is not a safety trace: it is not JSON. Choose a trace saved as JSON, or a PNG that "
            "Save Image with Safety Trace wrote."
        ) from error
    return Trace.from_dict(content, name)


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _text_of_png(path: Path) -> str:
    """Return the trace's text. The pixels are not decoded."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(METADATA)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name} cannot be read as a PNG. Save the image again.") from error
    if not isinstance(text, str):
        raise ValueError(
            f"{path.name} holds no safety trace. Choose a PNG that Save Image with Safety Trace wrote; "
            "other programs drop the texts of a PNG when they save it."
        )
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(
            f"The trace in {path.name} has more than {MAX_JSON_BYTES} bytes, which no run writes."
        )
    return text
