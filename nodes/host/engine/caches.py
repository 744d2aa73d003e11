"""Caches of predictions, and evaluations that they must not answer.

Caches such as EasyCache and LazyCache answer a model call from an earlier one if the noisy latent has changed
little. They do not see that a text embedding has changed in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

CACHE = "cache"
"""Part of the keys under which the host and other packs register wrappers that cache."""
HOLDER = "easycache"
"""The host's key for the memory of EasyCache or LazyCache in the options of a transformer."""


def is_cache(key: object) -> bool:
    """Return True for the key of wrappers that cache predictions."""
    return CACHE in str(key).lower()


def without_caches(options: dict[str, Any]) -> dict[str, Any]:
    """Copy the host's options of an evaluation, without the wrappers that cache predictions."""
    transformer = options["transformer_options"]
    wrappers = {
        kind: {key: found for key, found in by_key.items() if not is_cache(key)}
        for kind, by_key in transformer.get("wrappers", {}).items()
    }
    return {**options, "transformer_options": {**transformer, "wrappers": wrappers}}


def call_afresh(executor: Callable[..., Tensor], guider: Any, *args: Any) -> Tensor:
    """Call the rest of the wrappers around a guider's prediction without those that cache it.

    A cache of whole predictions knows no texts, so it forgets: its answers would be of the time before the
    text changed.
    """
    around = guider.model_options["transformer_options"].get("wrappers", {})
    by_key = around.get(WrappersMP.PREDICT_NOISE, {})
    caches = [wrapper for key, found in by_key.items() if is_cache(key) for wrapper in found]
    remaining = executor.wrappers[executor.idx + 1 :]  # type: ignore[attr-defined]
    kept = [wrapper for wrapper in remaining if wrapper not in caches]
    if len(kept) < len(remaining):
        _forget(guider.model_options["transformer_options"].get(HOLDER))
    original = executor.original  # type: ignore[attr-defined]
    denoised: Tensor = WrapperExecutor.new_class_executor(original, guider, kept).execute(*args)
    return denoised


def changed_rows(again: Tensor, before: Tensor, rows: Tensor) -> Tensor:
    """Return which of some rows (B,) bool have another prediction (B, C, h, w) than before."""
    return rows & (again != before).flatten(1).any(dim=1).to(rows.device)


def _forget(memory: Any) -> None:
    reset = getattr(memory, "reset", None)
    if callable(reset):
        reset()
