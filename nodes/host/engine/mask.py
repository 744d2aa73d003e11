"""Area in which a method may act: a MASK of the workflow together with the host's inpainting mask."""

from __future__ import annotations

import comfy.utils
import torch.nn.functional as F
from torch import Tensor

from .correction import Step


def area_of(mask: Tensor | None, step: Step) -> Tensor | None:
    """Return the area at the size of the step's latents, (1 or B, 1, h, w) in [0, 1], or None for everywhere.

    Args:
        mask: MASK of the workflow, (H, W) or (1, H, W) for all samples or (N, H, W) per image, or None.
        step: supplies size, device and the inpainting mask.
    """
    inpainted = None if step.denoise_mask is None else step.denoise_mask[:, :1].float()
    if mask is None:
        return inpainted
    whole = mask.reshape(-1, 1, *mask.shape[-2:]).float().nan_to_num(0).clamp(0, 1)  # (N, 1, H, W)
    small = F.interpolate(whole, size=step.denoised.shape[-2:], mode="area").to(step.denoised.device)
    if len(small) > 1:
        small = comfy.utils.repeat_to_batch_size(small, len(step.denoised))
    return small if inpainted is None else small * inpainted
