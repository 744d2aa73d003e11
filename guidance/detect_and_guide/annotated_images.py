"""Annotated images, from which guideline tokens are learnt.

Some have masks of a concept, others do not show it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AnnotatedImages:
    """Images with masks of the concept in them.

    Attributes:
        images: (N, H, W, 3) in [0, 1].
        masks: (N, H, W) in [0, 1], 1 where the concept is; 0 everywhere for images without it.
    """

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)


def annotate(images: Tensor, masks: Tensor, safe_images: Tensor | None = None) -> AnnotatedImages:
    """Join images with the concept and images without it into one annotated batch.

    Args:
        images: (N, H, W, 3 or 4) in [0, 1] with the concept.
        masks: (N or 1, h, w) in [0, 1] of any size, 1 where the concept is.
        safe_images: (M, H, W, 3 or 4) in [0, 1] without the concept.

    Returns:
        The N + M images, those with the concept first.

    Raises:
        ValueError: the number of masks, or the size of the images without the concept, does not match.
    """
    if len(masks) not in (1, len(images)) or masks.ndim != 3:
        raise ValueError(
            f"There are {len(images)} images but {len(masks)} masks. Connect one mask for every image."
        )
    masks = masks.expand(len(images), -1, -1)
    if masks.shape[1:] != images.shape[1:3]:
        masks = F.interpolate(masks[:, None].float(), size=images.shape[1:3], mode="area")[:, 0]
    together = images[..., :3]
    if safe_images is not None:
        if safe_images.shape[1:3] != images.shape[1:3]:
            raise ValueError(
                "The images without the concept have another size than those with it. "
                "Scale them to the same size."
            )
        together = torch.cat([together, safe_images[..., :3]])
        masks = torch.cat([masks, masks.new_zeros(len(safe_images), *masks.shape[1:])])
    return AnnotatedImages(together, masks)
