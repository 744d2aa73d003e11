"""Files of image classifiers: safetensors with half-precision weights and the network's configuration."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from ..guidance.safety_functions.classifier_network import ConvClassifier
from . import tensor_file

FORMAT = "safe-guidance classifier 1"


def save(classifier: ConvClassifier, path: Path) -> None:
    """Write weights and configuration; an existing file stays as it is until the new one is complete."""
    configuration = {"heads": classifier.heads, "widths": classifier.widths, "size": classifier.size}
    tensors = {name: tensor.half() for name, tensor in classifier.state_dict().items()}
    tensor_file.write(path, tensors, {"format": FORMAT, "configuration": json.dumps(configuration)})


def load(path: Path) -> ConvClassifier:
    """Read a file that `save` has written. The weights are float32 and need no gradient.

    Raises:
        ValueError: the file is not a classifier of this format.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path.name} is not an image classifier of the format '{FORMAT}'. Choose another file."
            )
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    classifier = ConvClassifier(**json.loads(metadata["configuration"]))
    classifier.load_state_dict(tensors)
    return classifier.requires_grad_(False).eval()
