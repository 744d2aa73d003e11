"""Hostile files that users keep: negation sets, guideline tokens, safety traces and images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from .detector_files import JSON, NUMBERS, Kind, altered, damaged

ASSETS = Path(__file__).resolve().parents[2] / "assets"
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM")
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")
SIDES = st.sampled_from([0, 1, 3, 8, 16])
TEXTS = st.one_of(
    st.text(st.characters(codec=None), max_size=30),
    st.sampled_from(["", "\ud800", "\x00", "nan", "1e999", "<b>", "[[a|b]]", "\u202e", "../x", "con"]),
    st.sampled_from(["[" * 5000, "x" * 100_000, "1," * 50_000, "a/" * 1000]),
)
"""Texts as anything may send them."""


def _read_set(path: Path) -> object:
    from ...formats import negation_set

    return negation_set.load(path).content_hash


def _read_tokens(path: Path) -> object:
    from ...formats import guideline_token_file

    return guideline_token_file.load(path)


def _read_trace(path: Path) -> object:
    """Read a trace and draw it: what is read can be shown."""
    from ...reports.trace_file import read_trace
    from ...reports.trace_strip import strip
    from ...reports.trace_text import in_words, table

    trace = read_trace(path)
    return in_words(trace), table(trace), strip(trace), trace.to_json()


def _read_image(path: Path) -> object:
    """Read an image of a folder. A file that is no image is listed with a reason of one line."""
    from ...formats.image_files import Skipped, read_images

    (found,) = read_images(path.parent, [path], 64)
    if isinstance(found, Skipped):
        raise ValueError(f"{found.path} is skipped: {found.reason}. Convert it.")
    return found


@st.composite
def traces(draw: st.DrawFn) -> bytes:
    """Draw the JSON of a trace with some entries replaced."""
    source = json.loads(next((ASSETS / "traces").glob("*.json")).read_text(encoding="utf-8"))
    for _ in range(draw(st.integers(0, 3))):
        records = source.get("records")
        place: Any = draw(st.sampled_from([source, *(records[:3] if isinstance(records, list) else [])]))
        if not isinstance(place, dict) or not place:
            break
        name = draw(st.sampled_from(sorted(place)))
        value = draw(st.one_of(NUMBERS, JSON, TEXTS, st.lists(NUMBERS, max_size=4), _long_lists()))
        place[name] = value
    return json.dumps(source).encode()


def _long_lists() -> st.SearchStrategy[list[float]]:
    return st.sampled_from([1, 100_001, 200_001]).map(lambda length: [1.0] * length)


@st.composite
def traced_images(draw: st.DrawFn) -> bytes:
    """Draw a PNG with a trace among its texts."""
    texts = PngImagePlugin.PngInfo()
    key = draw(st.sampled_from(["safety_trace", "safety_trace", "workflow"]))
    texts.add_text(key, draw(traces()).decode(), zip=draw(st.booleans()))
    return _image_bytes(Image.new("RGB", (8, 8)), "PNG", pnginfo=texts)


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """Draw an image in any format and mode."""
    size = (draw(st.sampled_from([1, 7, 8, 9, 64, 200])), draw(st.sampled_from([1, 8, 33, 100])))
    image = Image.new(draw(st.sampled_from(IMAGE_MODES)), size)
    for format_name in (draw(st.sampled_from(IMAGE_FORMATS)), "TIFF"):
        try:
            return _image_bytes(image, format_name)
        except (OSError, ValueError, KeyError):
            continue
    return b""


def _image_bytes(image: Image.Image, format_name: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format_name, **options)
    return content.getvalue()


@st.composite
def lists_of_shapes(draw: st.DrawFn) -> bytes:
    """Draw a negation set from scratch, with images and masks of any shapes and types."""
    from safetensors.torch import save

    from ...formats.negation_set import FORMAT

    tensors = {}
    for index in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([f"picture.{index:06}", f"mask.{index:06}", "mask.x", "other"]))
        shape = draw(st.one_of(st.lists(SIDES, min_size=1, max_size=3), st.just([8, 2049, 3])))
        kind = draw(st.sampled_from([torch.uint8, torch.uint8, torch.float32, torch.int64]))
        tensors[name] = torch.zeros(shape, dtype=kind)
    metadata = {"format": FORMAT, "name": draw(st.text(max_size=10))}
    return save(tensors, metadata)


def kinds() -> dict[str, Kind]:
    """Return all formats by name."""

    def kind(files: st.SearchStrategy[bytes], suffix: str, read: Callable[[Path], object]) -> Kind:
        return Kind(damaged(files), suffix, read)

    bundled_set = ASSETS / "negation_sets" / "demo_star.safetensors"
    bundled_tokens = next((ASSETS / "guideline_tokens").glob("*.safetensors"))
    return {
        "negation set": kind(altered(bundled_set, "content_hash"), ".safetensors", _read_set),
        "negation set from scratch": kind(lists_of_shapes(), ".safetensors", _read_set),
        "guideline tokens": kind(altered(bundled_tokens, "tokens"), ".safetensors", _read_tokens),
        "trace": kind(traces(), ".json", _read_trace),
        "trace in an image": kind(traced_images(), ".png", _read_trace),
        "image": kind(images(), ".png", _read_image),
        "any bytes as a set": kind(st.binary(max_size=500), ".safetensors", _read_set),
        "any bytes as a trace": kind(st.binary(max_size=500), ".json", _read_trace),
        "any bytes as an image": kind(st.binary(max_size=500), ".png", _read_image),
    }
