"""The network's forwards that evaluate a guider's own branches, with other options inside the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..engine.correction import KEY
from ..engine.run import Run
from .placement import locate_rows


@dataclass(frozen=True)
class OwnForward:
    """A forward of the network that begins.

    Attributes:
        run: the sampling run.
        base: the host's model around the network.
        x: (B, C, h, w) or (B, C, T, h, w) the evaluated latents.
        timesteps: (B,) the noise levels as the host passes them on.
        text: (B, tokens, width) the text embeddings, or None.
        options: the host's transformer options.
    """

    run: Run
    base: Any
    x: Tensor
    timesteps: Tensor
    text: Tensor | None
    options: dict[str, Any]


def wrap_own_forwards(model: ModelPatcher, options_of: Callable[[OwnForward], dict[str, Any]]) -> None:
    """Give the network other transformer options while a guider evaluates its own branches.

    Args:
        model: a clone that takes part in runs (`hooks.attach`).
        options_of: returns the options of a forward; those that it has, to change nothing.
    """

    def apply_model(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **extra: Any,
    ) -> Any:
        options = transformer_options or {}
        run: Run | None = options.get(KEY)
        if run is not None and run.own_call is not None:
            options = options_of(OwnForward(run, executor.class_obj, x, t, c_crossattn, options))
        return executor(x, t, c_concat, c_crossattn, control, options, **extra)

    locate_rows(model)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
