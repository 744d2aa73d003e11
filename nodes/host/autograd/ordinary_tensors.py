"""Ordinary copies of inference tensors, which autograd may save; the originals come back after a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def ordinary(value: Any) -> Any:
    """Return `value`, or a copy that autograd may save if it is an inference tensor.

    Lists are converted element by element.
    """
    if isinstance(value, list):
        return [ordinary(element) for element in value]
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@contextmanager
def ordinary_attributes(holder: Any) -> Iterator[None]:
    """Replace an object's own inference tensors by ordinary ones for the length of a block."""
    tensors = {
        name: value
        for name, value in vars(holder).items()
        if isinstance(value, Tensor) and value.is_inference()
    }
    with with_attributes(holder, **{name: ordinary(value) for name, value in tensors.items()}):
        yield


@contextmanager
def ordinary_weights(module: nn.Module) -> Iterator[None]:
    """Replace weights that model code uses directly by copies, for one module and for this pass only."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = [
        (owned, name, tensor)
        for owned in (module._parameters, module._buffers)
        for name, tensor in owned.items()
        if tensor is not None and tensor.is_inference()
    ]
    for owned, name, tensor in replaced:
        copy = tensor.detach().clone()
        owned[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
    try:
        yield
    finally:
        for owned, name, tensor in replaced:
            owned[name] = tensor


@contextmanager
def with_attributes(holder: Any, **values: Any) -> Iterator[None]:
    """Set an object's own attributes, and restore the previous ones afterwards."""
    before = {name: vars(holder)[name] for name in values if name in vars(holder)}
    vars(holder).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(holder)[name]
        vars(holder).update(before)
