"""Small convolutional image classifier with several heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvClassifier(nn.Module):
    """3 x 3 convolutions with group norm, mean and max pooling, and a head of two layers.

    Args:
        heads: names of the classes of every head, such as {"shapes": ["circle", ...], "style": [...]}.
        widths: channels of each convolution. A convolution with more channels than the one before halves the
            resolution.
        size: side in pixels to which images are resized.
    """

    GROUPS = 8
    """Groups of each group norm. Every width is a multiple of it."""

    @staticmethod
    def stride(inputs: int, outputs: int) -> int:
        """Return the stride of a convolution between these numbers of channels."""
        return 2 if inputs != 3 and outputs > inputs else 1

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
            convolution = nn.Conv2d(inputs, outputs, 3, self.stride(inputs, outputs), padding=1)
            layers += [convolution, nn.GroupNorm(self.GROUPS, outputs), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        classes = sum(len(c) for c in self.heads.values())
        self.head = nn.Sequential(
            nn.Linear(2 * widths[-1], widths[-1]), nn.SiLU(), nn.Linear(widths[-1], classes)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, classes) of every head for images (B, 3, H, W) in [0, 1]."""
        x = F.interpolate(
            images * 2 - 1, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )
        h = self.features(x)
        logits = self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1))
        return dict(zip(self.heads, logits.split([len(c) for c in self.heads.values()], dim=1)))
