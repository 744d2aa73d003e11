"""Detectors for safety functions, from files in models/safety or from the packages that ship them.

A detector stays in memory until its file has another content.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import torch

from ....formats import classifier_file
from ....formats.tensor_file import content_hash
from ....guidance.safety_functions.bounded_network import BoundedNetwork
from ....guidance.safety_functions.classifier_network import ConvClassifier
from ....guidance.safety_functions.clip import ClipModel
from . import clip_models, onnx_models
from .onnx_models import OnnxClassifier
from .safety_files import safety_path

NUDENET_FILE = "320n.onnx"
KEPT_MODELS = 4
"""Models of each kind that stay in memory."""


def nudenet_file() -> Path:
    """Find the detector's file in the installed `nudenet` package.

    The package is not imported, because it needs OpenCV and onnxruntime.

    Raises:
        FileNotFoundError: the package is not installed, or it has no such file.
    """
    found = importlib.util.find_spec("nudenet")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / NUDENET_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"NudeNet's detector {NUDENET_FILE} is not installed. Install the pack's extra 'nudenet' "
        "(pip install .[nudenet] in its folder), or put the file into models/safety and choose it. "
        "Its authors publish it under the AGPL."
    )


def detector_hash(name: str | None) -> str:
    """Return the SHA-256 of a detector's file, by which a replaced file is noticed.

    Args:
        name: from `safety_names`; None for the file in the nudenet package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read.
    """
    return _hash(_path(name))


def _path(name: str | None) -> Path:
    return nudenet_file() if name is None else safety_path(name)


def _hash(path: Path) -> str:
    # Reading a pipe would wait for ever.
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a file. Choose another file.")
    try:
        return content_hash(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{path.name} cannot be read ({error.strerror}). Correct its permissions or choose another file."
        ) from error


@lru_cache(maxsize=KEPT_MODELS)
def _onnx(path: Path, _content: str) -> BoundedNetwork:
    """Load an ONNX file; the second argument makes another content a new entry of the cache."""
    return onnx_models.detector(path)


def nudenet_network(name: str | None) -> BoundedNetwork:
    """Load NudeNet's detector: the package's with None, else a file of models/safety by its name.

    Raises:
        ImportError: onnx2torch is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is not a network that can be used.
    """
    path = _path(name)
    return _onnx(path, _hash(path))


@lru_cache(maxsize=KEPT_MODELS)
def _classifier(path: Path, _content: str) -> ConvClassifier | OnnxClassifier:
    """Load a classifier; the second argument makes another content a new entry of the cache."""
    with torch.inference_mode(False):
        return onnx_models.classifier(path) if path.suffix == ".onnx" else classifier_file.load(path)


def classifier(name: str) -> ConvClassifier | OnnxClassifier:
    """Load an image classifier by its name from `safety_names`.

    Raises:
        ImportError: onnx2torch is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is not a classifier.
    """
    path = safety_path(name)
    return _classifier(path, _hash(path))


@lru_cache(maxsize=KEPT_MODELS)
def _clip(path: Path, _content: str, model_name: str) -> ClipModel:
    """Load a CLIP model; the second argument makes another content a new entry of the cache."""
    with torch.inference_mode(False):
        return clip_models.load(path, model_name)


def clip_model(name: str, model_name: str) -> ClipModel:
    """Load a CLIP model from a weights file.

    Args:
        name: of the file, from `safety_names`.
        model_name: of its architecture in open_clip; a small CLIP file needs none.

    Raises:
        ImportError: open_clip is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is no CLIP model, or its architecture is not in the list.
    """
    path = safety_path(name)
    return _clip(path, _hash(path), model_name)
