"""Files of image classifiers: safetensors with half-precision weights and the network's configuration.

The sizes of the network are those of the tensors in the file. The configuration adds the names of the classes
and the side of the images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..guidance.safety_functions.classifier_network import ConvClassifier
from . import tensor_file
from .atomic_file import replacing
from .tensor_file import TensorFile, is_whole

FORMAT = "safe-guidance classifier 1"
KEYS = frozenset({"heads", "widths", "size"})
MOST_LAYERS = 64
MOST_CLASSES = 10_000
MIN_SIZE, MAX_SIZE = 8, 512
"""Sides in pixels to which a classifier may resize images."""
MOST_NUMBERS = 2**27
"""Most numbers that the convolutions may compute for one image, which is 512 MiB."""


def save(classifier: ConvClassifier, path: Path) -> None:
    """Write weights and configuration; an existing file stays as it is until the new one is complete."""
    configuration = {"heads": classifier.heads, "widths": classifier.widths, "size": classifier.size}
    tensors = {name: tensor.half() for name, tensor in classifier.state_dict().items()}
    with replacing(path) as file:
        metadata = {"format": FORMAT, "configuration": json.dumps(configuration)}
        tensor_file.write_into(file, tensors, metadata)


def load(path: Path) -> ConvClassifier:
    """Read a file that `save` has written. The weights are float32 and need no gradient.

    Raises:
        ValueError: the file is not a classifier of this format.
        FileNotFoundError: there is no such file.
    """
    refusal = f"is not an image classifier of the format '{FORMAT}'. Choose another file."
    file = tensor_file.opened(path, FORMAT, refusal)
    description = file.description("configuration", KEYS)
    widths = _widths(file)
    if description["widths"] != widths:
        raise file.error("its configuration names other widths than its tensors have")
    heads, size = _heads(file, description["heads"]), _size(file, description["size"], widths)
    # Without memory for the weights, which come from the file.
    with torch.device("meta"):
        classifier = ConvClassifier(heads, widths, size)
    file.check({name: tuple(tensor.shape) for name, tensor in classifier.state_dict().items()})
    weights = {name: file.weights(name) for name in file.shapes}
    classifier.load_state_dict(weights, assign=True)
    return classifier.requires_grad_(False).eval()


def _widths(file: TensorFile) -> list[int]:
    """Return the channels of each convolution. Every third module of `features` is one."""
    shapes = [
        shape for shape in (file.shapes.get(f"features.{3 * i}.weight") for i in range(MOST_LAYERS)) if shape
    ]
    widths = [shape[0] for shape in shapes]
    if not widths or any(width == 0 or width % ConvClassifier.GROUPS for width in widths):
        raise file.error(f"its convolutions do not have a multiple of {ConvClassifier.GROUPS} channels")
    return widths


def _heads(file: TensorFile, heads: Any) -> dict[str, tuple[str, ...]]:
    """Return the classes of each head, checked for their types."""
    valid = (
        isinstance(heads, dict)
        and heads
        and all(isinstance(names, list) and names for names in heads.values())
    )
    if not valid or not all(isinstance(name, str) and name for names in heads.values() for name in names):
        raise file.error("its heads are not lists of class names")
    if sum(map(len, heads.values())) > MOST_CLASSES:
        raise file.error(f"it has more than {MOST_CLASSES} classes")
    return {head: tuple(names) for head, names in heads.items()}


def _size(file: TensorFile, size: Any, widths: list[int]) -> int:
    """Return the side of the images, checked with the memory that the convolutions need for one of them."""
    if not is_whole(size, MIN_SIZE, MAX_SIZE):
        raise file.error(f"its size is not a whole number from {MIN_SIZE} to {MAX_SIZE}")
    side, numbers = int(size), 0
    for inputs, outputs in zip((3, *widths), widths):
        side = -(-side // ConvClassifier.stride(inputs, outputs))
        numbers += outputs * side**2
    if numbers > MOST_NUMBERS:
        raise file.error(f"it needs {numbers} numbers for one image, more than {MOST_NUMBERS}")
    return int(size)
