"""Conversion between 8-bit pixels and floats in [0, 1]."""

from __future__ import annotations

from torch import Tensor


def to_floats(values: Tensor) -> Tensor:
    """Return 8-bit values as float32 in [0, 1]; the shape stays."""
    return values.float() / 255


def to_bytes(values: Tensor) -> Tensor:
    """Return floats as uint8, clamped to [0, 1] and rounded; the shape stays."""
    return (values.clamp(0, 1) * 255).round().byte()
