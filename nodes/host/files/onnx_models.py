"""Networks from ONNX files, as torch modules that stay within limits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....formats.tensor_file import parsed as parsed_json
from ....guidance.safety_functions.bounded_network import (
    ALL_BASE,
    ALL_OF_WEIGHTS,
    ONE_BASE,
    ONE_OF_WEIGHTS,
    BoundedNetwork,
    MemoryLimit,
)
from . import onnx_checks
from .packages import need

DEFAULT_SIDE = 224
"""Side in pixels of an image for a classifier that takes any size."""
TRIAL_SIDE = 320
"""Side in pixels of the image on which a network that takes any size is tried."""


class OnnxClassifier(nn.Module):
    """An ONNX classifier with the interface of `ConvClassifier` and one head, named "classes".

    Args:
        network: images (B, 3, height, width) to (B, classes).
        classes: their names.
        size: (height, width) of the network's input.
        probabilities: the network returns probabilities instead of logits.
    """

    def __init__(
        self, network: nn.Module, classes: tuple[str, ...], size: tuple[int, int], probabilities: bool
    ) -> None:
        super().__init__()
        self.network, self.size, self.probabilities = network, size, probabilities
        self.heads = {"classes": classes}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, classes) of images (B, 3, H, W) in [0, 1]."""
        resized = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        output = self.network(resized)
        return {"classes": torch.logit(output, eps=1e-6) if self.probabilities else output}


def detector(path: Path) -> BoundedNetwork:
    """Read an ONNX file with one input, images (B, 3, H, W), and one output.

    Raises:
        ImportError: onnx or onnx2torch is not installed.
        ValueError: the file is damaged, needs too much memory, or cannot be converted.
    """
    try:
        model, size = _model(path)
        network = _converted(model, path)
        _trial(network, (size[0] or TRIAL_SIDE, size[1] or TRIAL_SIDE))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be used: {error}. Choose another ONNX file.") from error
    return network


def classifier(path: Path) -> OnnxClassifier:
    """Read an ONNX classifier; a last Sigmoid or Softmax layer means that it returns probabilities.

    Raises:
        ImportError: onnx or onnx2torch is not installed.
        ValueError: the file is damaged, needs too much memory, or is not an image classifier.
    """
    try:
        model, (height, width) = _model(path)
        size = (height or DEFAULT_SIDE, width or DEFAULT_SIDE)
        network = _converted(model, path)
        output = _trial(network, size)
        if output.ndim != 2:
            raise ValueError("its output is not (B, classes)")
        classes = _class_names(model, output.shape[1])
    except ValueError as error:
        raise ValueError(
            f"{path.name} is not an image classifier that can be used: {error}. Choose another ONNX file."
        ) from error
    last = next((node.op_type for node in model.graph.node if model.graph.output[0].name in node.output), "")
    return OnnxClassifier(network, classes, size, last in ("Sigmoid", "Softmax")).eval()


def _model(path: Path) -> tuple[Any, tuple[int | None, int | None]]:
    """Read and check a file, and return the model and the size of its input."""
    onnx = need("onnx", "nudenet")
    if path.stat().st_size > onnx_checks.MOST_BYTES:
        raise ValueError(f"it is larger than {onnx_checks.MOST_BYTES} bytes")
    model = onnx_checks.parsed(onnx, path.read_bytes())
    return model, onnx_checks.input_size(model)


def _converted(model: Any, path: Path) -> BoundedNetwork:
    """Convert a checked model to torch."""
    convert = need("onnx2torch", "nudenet").convert
    nodes, size = len(model.graph.node), model.ByteSize()
    one, total = ONE_OF_WEIGHTS * size + ONE_BASE, ALL_OF_WEIGHTS * size + ALL_BASE
    try:
        # Gradients cannot flow through weights that were made under inference mode.
        with torch.inference_mode(False), MemoryLimit(one, total), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network: nn.Module = convert(model)
    except Exception as error:  # The converter has no common class of errors.
        raise ValueError(f"it cannot be converted to torch ({type(error).__name__})") from error
    return BoundedNetwork(network.requires_grad_(False).eval(), path.name, nodes)


def _trial(network: BoundedNetwork, size: tuple[int, int]) -> Tensor:
    """Return the network's output for one grey image. A network that fails is refused when it is read."""
    with torch.inference_mode():
        return network.tried(torch.full((1, 3, *size), 0.5))


def _class_names(model: Any, count: int) -> tuple[str, ...]:
    """Return the names of a classifier's classes, which are numbers unless the file has names."""
    text = next((entry.value for entry in model.metadata_props if entry.key == "classes"), None)
    if text is None:
        return tuple(str(number) for number in range(count))
    names = parsed_json(text)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("its classes are not a list of names")
    if len(names) != count:
        raise ValueError(f"it names {len(names)} classes and its output has {count}")
    return tuple(names)
