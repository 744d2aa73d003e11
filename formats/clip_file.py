"""Files of small CLIP models: safetensors with only the rows of the text embedding table that are used.

The metadata holds the configuration of the two towers. `tools/demo_model/train_clip.py` writes such a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FORMAT = "safe-guidance clip 1"


@dataclass(frozen=True)
class SmallClip:
    """Contents of a file.

    Attributes:
        configuration: `embed_dim`, and the arguments of open_clip's `vision` and `text` configurations.
        weights: float32 tensors by name, without the text embedding table.
        vocabulary: (n,) int64, the token numbers whose embeddings are stored.
        token_embeddings: (n, width) float32, the rows of the text embedding table for them.
    """

    configuration: dict[str, Any]
    weights: dict[str, Tensor]
    vocabulary: Tensor
    token_embeddings: Tensor


def load(path: Path) -> SmallClip | None:
    """Read a file of this format; None for a safetensors file of another format."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    vocabulary = tensors.pop("vocabulary").long()
    token_embeddings = tensors.pop("token_embedding.rows").float()
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    return SmallClip(json.loads(metadata["configuration"]), weights, vocabulary, token_embeddings)
