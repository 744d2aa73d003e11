"""Network of the judge: a classifier of the demo world's images that no method uses.

Its architecture, training images and seed differ from those of the guide classifier in `assets/demo_model`,
which methods may use. So a method that only deceives its own detector still counts as failed.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
STYLES = ("flat", "outline", "dotted", "hatched")
BACKGROUNDS = ("grey", "black", "teal", "brown")
PATTERNS = ("plain", "striped", "checkered")
HEADS = {"shapes": SHAPES, "colors": COLORS, "style": STYLES, "background": BACKGROUNDS, "pattern": PATTERNS}
PATCH = 4


class PreActivationBlock(nn.Module):
    """Residual block: x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Judge(nn.Module):
    """Residual network on 4x4 patches of the full-size image, one linear head."""

    def __init__(self, widths: tuple[int, ...] = (64, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3 * PATCH**2, widths[0], 3, padding=1)]
        for inputs, outputs in zip((widths[0], *widths), widths):
            if outputs != inputs:
                layers.append(nn.Conv2d(inputs, outputs, 2, stride=2))
            layers += [PreActivationBlock(outputs), PreActivationBlock(outputs)]
        self.body = nn.Sequential(*layers, nn.GroupNorm(8, widths[-1]), nn.SiLU())
        self.head = nn.Linear(2 * widths[-1], sum(len(classes) for classes in HEADS.values()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits (B, classes) of every head.

        Args:
            images: (B, 3, H, W) in [0, 1]; H and W are multiples of 4.
        """
        h = self.body(F.pixel_unshuffle(images * 2 - 1, PATCH))
        logits = self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1))
        return dict(zip(HEADS, logits.split([len(classes) for classes in HEADS.values()], dim=1)))


def load_judge(path: Path = Path(__file__).parent / "judge.safetensors") -> Judge:
    """Load the trained judge for inference in single precision."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.requires_grad_(False).eval()
