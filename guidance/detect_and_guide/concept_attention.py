"""Maps of concepts in the output space of joint attention, for transformers without cross-attention.

Helbling et al., ConceptAttention (ICML 2025), section 4. Concept tokens pass through the text stream's own
weights beside the prompt. They attend to each other and to the image, and the image never attends to them.
A concept is where the output of the image's attention resembles that of the concept's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def concept_outputs(
    queries: Tensor, keys: Tensor, values: Tensor, image_keys: Tensor, image_values: Tensor
) -> Tensor:
    """Return the outputs of the concepts' attention to themselves and to the image (paper, Eq. 4).

    softmax(q_c [k_c; k_x]^T / sqrt(d)) [v_c; v_x], before the output projection.

    Args:
        queries, keys, values: (B, heads, 1 + K, d) of the concept tokens.
        image_keys, image_values: (B, heads, positions, d) of the image.

    Returns:
        (B, 1 + K, heads * d), heads side by side.
    """
    keys = torch.cat([keys, image_keys], 2)
    values = torch.cat([values, image_values], 2)
    outputs = F.scaled_dot_product_attention(queries, keys, values)  # (B, heads, 1 + K, d)
    return outputs.transpose(1, 2).flatten(2)


def output_maps(concepts: Tensor, image: Tensor, size: tuple[int, int], temperature: float = 1.0) -> Tensor:
    """Return each concept's share at every position: softmax over concepts of <o_c, o_x> (paper, Eq. 6).

    Args:
        concepts: (B, 1 + K, D) outputs of the concepts' attention.
        image: (B, height * width, D) outputs of the image's attention.
        size: (height, width).
        temperature: divisor of the scores.

    Returns:
        (B, 1 + K, height, width) float32, in [0, 1], summing to 1 over the concepts.
    """
    scores = concepts.float() @ image.float().transpose(1, 2) / temperature  # (B, 1 + K, height * width)
    return scores.softmax(1).unflatten(-1, size)
