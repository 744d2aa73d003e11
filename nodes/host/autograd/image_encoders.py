"""Differentiable image encoders: the host's CLIP_VISION models and CLIP models of open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....guidance.safety_functions.clip import ClipModel
from .auxiliary_models import use_patcher

FLEXIBLE_SIDE = 256
"""Side to which images are scaled for encoders of any size (SigLIP 2 NaFlex): 16 x 16 patches."""


class ClipVisionEncoder:
    """A CLIP_VISION of the host: CLIP, SigLIP, SigLIP 2, DINOv2 or DINOv3.

    The host's own preprocessing rounds to bytes, which stops gradients. This one scales and crops in the same
    way and keeps the values.

    Args:
        clip_vision: as the host's loaders return it.
    """

    def __init__(self, clip_vision: Any) -> None:
        self.name = str(clip_vision.model_type)
        self.networks: Sequence[nn.Module] = [clip_vision.model]
        self.size = clip_vision.image_size if clip_vision.image_size > 0 else FLEXIBLE_SIDE
        self.mean, self.std = tuple(clip_vision.image_mean), tuple(clip_vision.image_std)
        self._clip_vision = clip_vision
        use_patcher(clip_vision.model, clip_vision.patcher)

    def __call__(self, images: Tensor) -> Tensor:
        """Return unit embeddings (B, D) float32 of images (B, 3, H, W), nominally in [0, 1]."""
        images = images.to(self._clip_vision.load_device, torch.float32)
        resized = cover_and_crop(images, self.size).clamp(0, 1)
        mean = resized.new_tensor(self.mean)[:, None, None]
        std = resized.new_tensor(self.std)[:, None, None]
        embedded = self._clip_vision.model(pixel_values=(resized - mean) / std, intermediate_output=-2)[2]
        if embedded.ndim == 3:  # SigLIP without its pooling head: one vector per patch
            embedded = embedded.mean(1)
        return F.normalize(embedded.float(), dim=1)


class OpenClipEncoder:
    """The vision tower of a CLIP model of open_clip.

    Args:
        clip: the model.
        name: of its file.
    """

    def __init__(self, clip: ClipModel, name: str) -> None:
        self.name = name
        self.networks: Sequence[nn.Module] = [clip.network]
        self._clip = clip

    def __call__(self, images: Tensor) -> Tensor:
        """Return unit embeddings (B, D) float32 of images (B, 3, H, W), nominally in [0, 1]."""
        return self._clip.embed(images)


def cover_and_crop(images: Tensor, side: int) -> Tensor:
    """Scale images (B, 3, H, W) to a shorter side of `side`, and crop the centre: (B, 3, side, side)."""
    height, width = images.shape[-2:]
    if (height, width) == (side, side):
        return images
    scale = side / min(height, width)
    size = (max(side, round(scale * height)), max(side, round(scale * width)))
    resized = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return resized[..., top : top + side, left : left + side]
