"""Hostile detector files: each is read, or refused with one clear error.

`tests/unit/test_fuzz_detector_files.py` runs a few hundred, `run` any number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from . import onnx_files

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
MOST_CHARACTERS = 1000
CLEAR = re.compile(r"[^\n\r]+\. [A-Z][^\n\r]+\.")
"""One sentence of fact and one of what to do, on one line."""
NUMBERS = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([64, 96, 49408, 2**16, 10**6, 10**9, 2**31, 2**63, 10**30, True, None, 0.5, 1e300, "64"]),
    st.sampled_from([float("nan"), float("inf"), -1.0]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FOREIGN = {
    "timm_model_name": "hf-hub:someone/model",
    "timm_model_pretrained": True,
    "hf_model_name": "roberta-base",
    "hf_tokenizer_name": "someone/tokenizer",
    "layers": 10**9,
    "image_size": 10**6,
}
"""Entries of open_clip's configurations that download, or ask for memory."""


@dataclass(frozen=True)
class Kind:
    """One format.

    Attributes:
        files: strategy for the contents of a file.
        suffix: of the file.
        read: reads a file; the module must be imported only after the host.
    """

    files: st.SearchStrategy[Any]
    suffix: str
    read: Callable[[Path], object]


def _read_classifier(path: Path) -> object:
    from ...formats import classifier_file

    return classifier_file.load(path)


def _read_clip(path: Path) -> object:
    from ...nodes.host.files import clip_models

    return clip_models.load(path, "ViT-B-32")


def _read_latents(path: Path) -> object:
    from ...formats import latent_file

    return latent_file.read(path, "key")


def _read_demo_model(path: Path) -> object:
    from ...nodes.host.files.demo_model import read_weights

    return read_weights(path)


def _read_detector(path: Path) -> object:
    from ...nodes.host.files import onnx_models

    return onnx_models.detector(path)


def _read_onnx_classifier(path: Path) -> object:
    from ...nodes.host.files import onnx_models

    return onnx_models.classifier(path)(torch.zeros(1, 3, 16, 16))


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Draw contents, some of them with flipped, removed, repeated or foreign bytes."""
    content = draw(contents)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2, 5]))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        # Most of what can go wrong is in the header.
        place = min(place, draw(st.sampled_from([place, 8, 300, 2000])))
        length, change = draw(st.integers(1, 40)), draw(st.sampled_from("flip cut repeat insert end".split()))
        part = content[place : place + length]
        changed = {
            "flip": bytes(byte ^ draw(st.integers(1, 255)) for byte in part[:4]) + part[4:],
            "cut": b"",
            "repeat": part * 3,
            "insert": draw(st.binary(max_size=20)) + part,
        }
        content = (
            content[:place]
            if change == "end"
            else content[:place] + changed[change] + content[place + length :]
        )
    return content


@st.composite
def altered(draw: st.DrawFn, source: Path, key: str) -> bytes:
    """Draw a file of the pack with other tensors or another configuration in its metadata.

    Args:
        draw: given by hypothesis.
        source: a valid file.
        key: entry of the metadata that has the configuration.
    """
    from safetensors import safe_open

    with safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    for _ in range(draw(st.integers(0, 2))):
        _alter_tensor(draw, tensors)
    if draw(st.booleans()):
        entry = draw(st.sampled_from([key, key, "format"]))
        metadata[entry] = draw(_texts(metadata.get(entry, "")))
    return save(tensors, metadata)


def _texts(text: str) -> st.SearchStrategy[str]:
    """Return texts near a JSON text."""
    strange = [
        "",
        "[" * 3000,
        "{}",
        "null",
        '{"a":' * 2000,
        "9" * 5000,
        "\ud7ff",
        "NaN",
        text + " ",
        text[:-1],
    ]
    return st.one_of(st.sampled_from(strange), st.text(max_size=20), _configurations(text))


@st.composite
def _configurations(draw: st.DrawFn, text: str) -> str:
    """Draw a JSON text with one value replaced, added or removed at some depth."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    place = found
    while isinstance(place, dict) and place and draw(st.booleans()):
        inner = [value for value in place.values() if isinstance(value, dict)]
        if not inner:
            break
        place = draw(st.sampled_from(inner))
    if isinstance(place, dict) and place:
        name = draw(st.sampled_from(sorted(place)))
        change = draw(st.sampled_from("number json remove foreign".split()))
        if change == "remove":
            del place[name]
        elif change == "foreign":
            key = draw(st.sampled_from(sorted(FOREIGN)))
            place[key] = FOREIGN[key]
        else:
            place[name] = draw(NUMBERS if change == "number" else JSON)
    return json.dumps(found)


def _alter_tensor(draw: st.DrawFn, tensors: dict[str, Tensor]) -> None:
    """Remove, rename, reshape, retype or spoil one tensor."""
    if not tensors:
        return
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    change = draw(st.sampled_from("remove rename shape type nan value add empty".split()))
    if change in ("remove", "rename"):
        del tensors[name]
    if change in ("rename", "add"):
        tensors[draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))] = tensor.clone()
    if change == "shape":
        tensors[name] = torch.zeros(draw(st.lists(st.integers(0, 9), max_size=5)), dtype=tensor.dtype)
    if change == "type":
        kinds = [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
        tensors[name] = tensor.to(draw(st.sampled_from(kinds)))
    if change in ("nan", "value") and tensor.numel():
        spoiled = float("nan") if change == "nan" and tensor.is_floating_point() else 7.0
        tensors[name].view(-1)[draw(st.integers(0, tensor.numel() - 1))] = spoiled
    if change == "empty":
        tensors[name] = torch.zeros(0, *tensor.shape[1:], dtype=tensor.dtype)


def kinds(latents: Path) -> dict[str, Kind]:
    """Return all formats by name.

    Args:
        latents: a valid file of latents with the key "key".
    """

    def altered_file(source: Path, key: str) -> st.SearchStrategy[bytes]:
        return damaged(altered(source, key))

    return {
        "classifier": Kind(
            altered_file(ASSETS / "guide.safetensors", "configuration"), ".safetensors", _read_classifier
        ),
        "clip": Kind(altered_file(ASSETS / "clip.safetensors", "configuration"), ".safetensors", _read_clip),
        "latents": Kind(altered_file(latents, "key"), ".latents", _read_latents),
        "demo model": Kind(
            altered_file(ASSETS / "demo_model.safetensors", "unet"), ".safetensors", _read_demo_model
        ),
        "onnx detector": Kind(damaged(onnx_files.models()), ".onnx", _read_detector),
        "onnx classifier": Kind(damaged(onnx_files.models()), ".onnx", _read_onnx_classifier),
    }


def answer(kind: Kind, content: bytes, folder: Path) -> str:
    """Read one file and return "read" or the text of the pack's error.

    Raises:
        AssertionError: the error is not the pack's own, or it is not clear.
    """
    path = folder / f"hostile{kind.suffix}"
    path.write_bytes(content)
    try:
        kind.read(path)
    except ValueError as error:
        text = str(error)
        assert type(error) is ValueError, f"{type(error).__name__} is not the pack's error: {text}"
        assert CLEAR.fullmatch(text) and len(text) <= MOST_CHARACTERS, f"The error is not clear: {text!r}"
        assert path.name in text, f"The error does not name the file: {text!r}"
        return text
    return "read"


def run(kind: Kind, number: int, count: int, checker: Callable[[bytes], Any]) -> None:
    """Give `count` files of a kind to a checker, which raises AssertionError for a wrong answer.

    Args:
        kind: the format.
        number: seed of the files.
        count: number of files.
        checker: is called with the contents of each file.
    """

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.files)
    def one(content: bytes) -> None:
        checker(content)

    one()
