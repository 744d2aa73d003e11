"""Unsafe scores of predictions in latent space, and the gradients of these scores."""

from __future__ import annotations

import logging

import comfy.model_management
import torch
from torch import Tensor

from ....guidance.safety_functions.interface import Assessment, SafetyFunction
from ....reports.plain_text import log, one_line
from .decoders import Decoder
from .differentiable_layers import differentiable
from .ordinary_tensors import ordinary, ordinary_attributes

LONGEST_REASON = 200
"""Most characters of a library's error that a message repeats."""


def assess(decoder: Decoder, function: SafetyFunction, latents: Tensor) -> Assessment:
    """Return the safety function's assessment of predictions (B, C, h, w), without a graph."""
    return function(decoder(latents))


def prediction_gradient(decoder: Decoder, function: SafetyFunction, latents: Tensor) -> Tensor:
    """Return the gradient of the sum of the unsafe scores for predictions (B, C, h, w), in float32.

    Raises:
        ValueError: gradients do not flow through the safety function or the decoder.
    """
    networks = (*decoder.networks, *function.networks)
    try:
        with differentiable(*networks), ordinary_attributes(decoder.latent_format):
            leaf = ordinary(latents).detach().float().clone().requires_grad_(True)
            score = function(decoder(leaf)).score
            if not score.requires_grad:
                log(logging.WARNING, f"the score of {function.name} has no gradient, so it guides nothing.")
                return torch.zeros_like(leaf)
            return torch.autograd.grad(score.sum(), leaf)[0]
    except RuntimeError as error:
        if comfy.model_management.is_oom(error):
            raise
        reason = one_line(str(error), LONGEST_REASON)
        raise ValueError(
            f"Gradients do not flow through {function.name} or the decoder ({reason}). "
            "Choose another safety function or decoder."
        ) from error
