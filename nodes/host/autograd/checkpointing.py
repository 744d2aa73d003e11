"""Checkpoints at a network's blocks: the backward pass recomputes what the forward pass did not keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a network: the elements of its module lists.

    A UNet's blocks are split into their layers, because ComfyUI calls these one by one.
    """
    middle = getattr(network, "middle_block", None)
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    for element in [
        *(element for found in lists for element in found),
        *([middle] if isinstance(middle, nn.Module) else []),
    ]:
        yield from element if isinstance(element, nn.Sequential) else (element,)


def checkpointed_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a block's forward function that keeps its inputs only and recomputes the rest when needed."""

    def own(value: Any) -> Any:
        # ComfyUI adds to activations in place and counts blocks in its options: each run gets copies.
        if isinstance(value, dict):
            return value.copy()
        return value.clone() if isinstance(value, Tensor) else value

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(_snapshot, args)), {name: _snapshot(value) for name, value in kwargs.items()}

        def again() -> Any:
            return forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

        return checkpoint(again, use_reentrant=False, preserve_rng_state=False)

    return run


def _snapshot(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value
