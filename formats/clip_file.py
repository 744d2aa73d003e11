"""Files of small CLIP models: safetensors with only the rows of the text embedding table that are used.

The metadata holds the configuration of the two towers. `tools/demo_model/train_clip.py` writes such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import tensor_file
from .tensor_file import TensorFile, is_whole

FORMAT = "safe-guidance clip 1"
KEYS = frozenset({"embed_dim", "vision", "text"})
LIMITS = {"embed_dim": 4096}
VISION_LIMITS = {"image_size": 1024, "layers": 64, "width": 2048, "head_width": 2048, "patch_size": 256}
TEXT_LIMITS = {"context_length": 512, "vocab_size": 49408, "width": 2048, "heads": 64, "layers": 64}
"""Names and largest values of the configuration's numbers. The towers also have `mlp_ratio`."""
MOST_PATCHES = 64
"""Most patches along a side of an image."""
MLP_RATIOS = (0.1, 16.0)
VOCABULARY, ROWS, TABLE = "vocabulary", "token_embedding.rows", "token_embedding.weight"


@dataclass(frozen=True)
class SmallClip:
    """A file whose configuration is valid. No tensor has been read.

    Attributes:
        configuration: `embed_dim`, and the arguments of open_clip's `vision` and `text` configurations.
        file: names, types and shapes of the tensors.
    """

    configuration: dict[str, Any]
    file: TensorFile

    def weights(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Read the weights of the network as float32. Tokens that the file does not store get zeros.

        Args:
            shapes: of all tensors of the network that the configuration describes.

        Raises:
            ValueError: the tensors in the file have other names, shapes or types, or are not finite.
        """
        rows, (tokens, width) = self.file.shapes.get(VOCABULARY, ()), shapes[TABLE]
        if len(rows) != 1 or not rows[0] or self.file.dtypes[VOCABULARY] not in (torch.int32, torch.int64):
            raise self.file.error("it has no list of the tokens that it knows")
        networks = {name: shape for name, shape in shapes.items() if name != TABLE}
        self.file.check(
            {**networks, ROWS: (rows[0], width), VOCABULARY: rows}, ignored=frozenset({VOCABULARY})
        )
        vocabulary = self.file.tensor(VOCABULARY).long()
        if int(vocabulary.min()) < 0 or int(vocabulary.max()) >= tokens:
            raise self.file.error(f"it knows tokens outside 0 to {tokens - 1}")
        found = {name: self.file.weights(name) for name in networks}
        found[TABLE] = torch.zeros(tokens, width)
        found[TABLE][vocabulary] = self.file.weights(ROWS)
        return found


def load(path: Path) -> SmallClip | None:
    """Read the configuration of a file of this format; None for a safetensors file of another format.

    Raises:
        ValueError: the file is damaged, or its configuration has unknown keys or sizes that are not allowed.
        FileNotFoundError: there is no such file.
    """
    file = tensor_file.structure(path)
    if file.metadata.get("format") != FORMAT:
        return None
    configuration = file.description("configuration", KEYS)
    vision, text = configuration["vision"], configuration["text"]
    _check_numbers(file, {"embed_dim": configuration["embed_dim"]}, LIMITS, "configuration")
    _check_numbers(file, vision, VISION_LIMITS, "vision")
    _check_numbers(file, text, TEXT_LIMITS, "text")
    if text["width"] % text["heads"] or vision["width"] % vision["head_width"]:
        raise file.error("a width in its configuration is not a multiple of its attention heads")
    patches, rest = divmod(vision["image_size"], vision["patch_size"])
    if rest or not 1 <= patches <= MOST_PATCHES:
        raise file.error(f"its images are not divided into 1 to {MOST_PATCHES} patches a side")
    return SmallClip(configuration, file)


def _check_numbers(file: TensorFile, numbers: Any, limits: Mapping[str, int], part: str) -> None:
    """Check that a part of the configuration has the keys of `limits` and whole numbers within them."""
    if not isinstance(numbers, dict) or numbers.keys() - {"mlp_ratio"} != limits.keys():
        raise file.error(f"the part '{part}' of its configuration must have the keys {', '.join(limits)}")
    for name, most in limits.items():
        if not is_whole(numbers[name], 1, most):
            raise file.error(
                f"the value '{name}' of its configuration is not a whole number from 1 to {most}"
            )
    ratio, (least, largest) = numbers.get("mlp_ratio", 4.0), MLP_RATIOS
    if type(ratio) not in (int, float) or not least <= ratio <= largest:
        raise file.error(f"the value 'mlp_ratio' of its configuration is not from {least} to {largest}")
