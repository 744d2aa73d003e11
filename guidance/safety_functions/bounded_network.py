"""Limits for networks from files: the size of every tensor is known before the tensor exists.

A small file can describe a network that needs any amount of memory, for example by repeated concatenation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MIB = 2**20
ONE_FACTOR = 32
"""Largest tensor of a network, in units of its input. The convolutions of VGG need 22."""
NODE_FACTOR, MOST_FACTOR = 8, 512
"""All tensors of a network, in units of its input: for each node, and at most."""
ONE_OF_WEIGHTS, ALL_OF_WEIGHTS = 4, 16
"""Share of both limits that the weights add, in units of their bytes. Transformers need it."""
ONE_BASE, ALL_BASE = 16 * MIB, 64 * MIB
"""Bytes that every network may use."""
MOST_PARTS = 4096
"""Most tensors that one tensor may be divided into."""
VALUES = frozenset({"item", "_local_scalar_dense", "is_nonzero", "equal", "is_same_size"})
"""Operations that return no tensor."""


class TooLargeError(ValueError):
    """Error of an operation that would exceed a limit."""


class MemoryLimit(TorchDispatchMode):
    """Stops an operation before it makes a tensor that is too large.

    Each operation runs first on tensors without memory, which tells the sizes of its results.

    Args:
        one: most bytes of one tensor; views count in full.
        total: most bytes of all tensors that are made.
    """

    def __init__(self, one: int, total: int) -> None:
        super().__init__()
        self.one, self.left = one, total

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.overloadpacket.__name__ not in VALUES:
            self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if func.overloadpacket.__name__ == "unbind":
            parts = args[0].shape[args[1] if len(args) > 1 else 0]
            if parts > MOST_PARTS:
                raise TooLargeError(f"it divides a tensor into {parts} parts")
        planned_args, planned = tree_map(_without_memory, (tuple(args), kwargs))
        if "device" in planned:
            planned["device"] = torch.device("meta")
        known = {_storage(leaf) for leaf in tree_leaves((planned_args, planned)) if isinstance(leaf, Tensor)}
        for result in tree_leaves(func(*planned_args, **planned)):
            if not isinstance(result, Tensor):
                continue
            size = result.numel() * result.element_size()
            if size > self.one:
                raise TooLargeError(f"one of its tensors needs {size // MIB} MiB")
            if _storage(result) not in known:
                self.left -= size
        if self.left < 0:
            raise TooLargeError("its tensors together need too much memory")


def _without_memory(value: Any) -> Any:
    """Return a tensor of the same shape on the meta device; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class BoundedNetwork(nn.Module):
    """A network from a file that stays within its limits and raises clear errors.

    Args:
        network: images (B, 3, H, W) to one tensor whose first dimension is B.
        name: of the file, for messages.
        nodes: number of its operations.
    """

    def __init__(self, network: nn.Module, name: str, nodes: int) -> None:
        super().__init__()
        self.network, self.file_name = network, name
        self.factor = min(MOST_FACTOR, NODE_FACTOR * nodes)
        tensors = [*network.parameters(), *network.buffers()]
        self.weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's output for images (B, 3, H, W).

        Raises:
            ValueError: the network fails, exceeds its limits, or its output has numbers that are not finite
                although those of the images are.
        """
        try:
            return self.tried(images)
        except ValueError as error:
            count, _, height, width = images.shape
            raise ValueError(
                f"{self.file_name} cannot process {count} images of {width} x {height} pixels: {error}. "
                "Choose another detector or another size."
            ) from error

    def tried(self, images: Tensor) -> Tensor:
        """Return the output like `forward`. Errors say what is wrong as the second half of a sentence."""
        size = images.numel() * images.element_size()
        one = ONE_FACTOR * size + ONE_OF_WEIGHTS * self.weight_bytes + ONE_BASE
        total = self.factor * size + ALL_OF_WEIGHTS * self.weight_bytes + ALL_BASE
        try:
            # Not by a call: a module of torch.fx then prints its generated code when it fails.
            with MemoryLimit(one, total):
                output = self.network.forward(images)
        except (TooLargeError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # Operations have no common class of errors.
            raise ValueError(f"one of its operations fails ({_first_line(error)})") from error
        if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != len(images):
            raise ValueError("it does not return one output per image")
        if not output.is_floating_point():
            raise ValueError("its output has no floating-point numbers")
        if not bool(torch.isfinite(output).all()) and bool(torch.isfinite(images).all()):
            raise ValueError("its output has numbers that are not finite")
        return output


def _first_line(error: Exception) -> str:
    """Return the beginning of an error's text, or its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
