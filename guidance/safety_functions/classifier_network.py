"""A small convolutional image classifier with several heads, stored with its configuration in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "safe-guidance classifier 1"


class ConvClassifier(nn.Module):
    """3x3 convolutions with group norm, mean and max pooling, and a two-layer head.

    Args:
        heads: names of the classes of every output, such as {"shapes": ["circle", ...], "style": [...]}.
        widths: channels of each convolution; a convolution that widens (other than the first) halves the resolution.
        size: side in pixels that images are reduced to.
    """

    def __init__(
        self,
        heads: Mapping[str, Sequence[str]],
        widths: Sequence[int] = (24, 48, 48, 96, 96, 128, 128),
        size: int = 64,
    ) -> None:
        super().__init__()
        self.heads = {name: tuple(classes) for name, classes in heads.items()}
        self.widths, self.size = tuple(widths), size
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *widths), widths):
            stride = 2 if inputs != 3 and outputs > inputs else 1
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        classes = sum(len(c) for c in self.heads.values())
        self.head = nn.Sequential(
            nn.Linear(2 * widths[-1], widths[-1]), nn.SiLU(), nn.Linear(widths[-1], classes)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of every head, (B, classes), for images (B, 3, H, W) in [0, 1]."""
        x = F.interpolate(
            images * 2 - 1, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )
        h = self.features(x)
        logits = self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1))
        return dict(zip(self.heads, logits.split([len(c) for c in self.heads.values()], dim=1)))

    def save(self, path: Path) -> None:
        """Write weights (half precision) and configuration."""
        configuration = json.dumps({"heads": self.heads, "widths": self.widths, "size": self.size})
        tensors = {
            name: tensor.detach().half().cpu().contiguous() for name, tensor in self.state_dict().items()
        }
        save_file(tensors, path, metadata={"format": FORMAT, "configuration": configuration})

    @classmethod
    def load(cls, path: Path) -> ConvClassifier:
        """Read a file written by `save`.

        Raises:
            ValueError: the file is not a classifier of this format.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path.name} is not an image classifier. Choose a file with the format '{FORMAT}'."
                )
            classifier = cls(**json.loads(metadata["configuration"]))
            classifier.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
        return classifier.requires_grad_(False).eval()
