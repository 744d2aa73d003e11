"""A gradient pass through the host: the run's options without what has no backward pass, and its errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

from ....reports.plain_text import one_line
from ..engine.caches import is_cache
from ..engine.correction import Step
from .ordinary_tensors import ordinary

FUNCTION_AROUND = "model_function_wrapper"
"""The host's key for another pack's function around the model, which may cache its predictions."""
COMPILED = "torch.compile"
"""Key of the host's wrappers that compile, which a gradient pass runs without."""


def run_gradient_pass(run: Callable[[dict[str, Any]], Any], step: Step) -> Any:
    """Run a gradient pass with other packs' patches, and without them if they cannot be differentiated.

    Args:
        run: computes the gradients with the given model options.
        step: the model step.

    Raises:
        ValueError: the pass fails both with and without the patches.
    """
    options = step.model_options
    failure: RuntimeError | None = None
    for keep_patches in (True, False):
        try:
            return run(_gradient_options(options, keep_patches))
        except RuntimeError as error:
            if comfy.model_management.is_oom(error):
                raise
            logging.debug("Safe Guidance: a gradient pass failed.", exc_info=True)
            failure = error
    raise ValueError(
        f"Gradients do not flow through this model ({one_line(str(failure), 200)}). "
        "Use Safe Data Guidance with the cheap gradient, which needs none, "
        "or load the model in another precision."
    ) from failure


def _gradient_options(model_options: dict[str, Any], keep_patches: bool) -> dict[str, Any]:
    """Copy the run's options for a gradient pass.

    The copy uses attention with a backward pass, no caches and one device.
    """
    transformer = dict(model_options.get("transformer_options", {}))
    others = transformer.get("optimized_attention_override") if keep_patches else None

    def attention(_: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return (
            others(attention_pytorch, *args, **kwargs)
            if others is not None
            else attention_pytorch(*args, **kwargs)
        )

    transformer["optimized_attention_override"] = attention
    transformer["wrappers"] = {
        kind: {key: found for key, found in by_key.items() if key != COMPILED and not is_cache(key)}
        for kind, by_key in transformer.get("wrappers", {}).items()
    }
    if not keep_patches:
        transformer.pop("patches", None)
        transformer.pop("patches_replace", None)
    for key, value in transformer.items():
        transformer[key] = ordinary(value)
    options = {**model_options, "transformer_options": transformer}
    options.pop("multigpu_clones", None)
    if not keep_patches:
        options.pop(FUNCTION_AROUND, None)
    return options
