"""The guider's own branches: which model calls of a forward evaluate them, and what they predict.

Other nodes evaluate the same prompts from inside the guider's forward: self-attention guidance with degraded
latents, perturbed-attention guidance with patched attention, perpendicular guidance with a text of its own.
None of these calls is the guider's, and no method may read or hear them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.context_windows import ContextHandlerABC
from torch import Tensor

from .correction import COND, UNCOND

HANDLER = "context_handler"
"""The host's key for context windows in the options of an evaluation."""


_numbers = itertools.count(1)


@dataclass(frozen=True)
class OwnCall:
    """A model call in progress that evaluates branches of the guider.

    Attributes:
        conds: the prepared conditioning of each evaluated branch, by name.
        x: (B, C, h, w) the evaluated latents: those of the step, or of one context window.
        window: the host's context window, or None for the whole latents.
        handler: the host's object that made the window.
        step_shape: shape of the step's latents.
        number: equal in all calls of one evaluation; an evaluation that replaces an earlier one has another.
    """

    conds: Mapping[str, Any]
    x: Tensor
    window: Any
    handler: Any
    step_shape: torch.Size
    number: int


class Branches:
    """Predictions of the guider's own branches in one forward.

    Attributes:
        predictions: by name, (B, C, h, w).
        call: the own call in progress; None during calls of other nodes and between calls.
    """

    def __init__(self, guider: Any, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> None:
        self._guider, self._x, self._timestep = guider, x, timestep
        self._claims: dict[str, int] = {}
        self._number = 0
        self._in_windows: Mapping[str, int] | None = None
        self.predictions: dict[str, Tensor] = {}
        self.call: OwnCall | None = None
        handler = options.get(HANDLER)
        self.options = options if handler is None else {**options, HANDLER: _Windows(handler, self)}
        """The options that the guider must be called with, so that its own calls are known."""

    @contextmanager
    def evaluating(
        self, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, options: dict[str, Any]
    ) -> Iterator[dict[str, int]]:
        """Make the block's call the guider's own if it is; give the positions of its branches in `conds`.

        Inside context windows these are the branches that all windows evaluate, and nothing is given, because
        the prediction of a window is none of a branch.
        """
        of_windows = self._in_windows
        window = None if of_windows is None else options["transformer_options"].get("context_window")
        own = self.claim(model, conds, x, timestep, options) if of_windows is None else of_windows
        before = self.call
        evaluated = {name: conds[index] for name, index in own.items()}
        of_step = options.get(HANDLER), self._x.shape, self._number
        self.call = OwnCall(evaluated, x, window, *of_step) if own else None
        try:
            yield dict(own) if of_windows is None else {}
        finally:
            self.call = before

    def claim(
        self, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, options: dict[str, Any]
    ) -> dict[str, int]:
        """Return the positions of the branches that this call evaluates for the guider, by name.

        The first call with the guider's own list counts. A call with other options, or with a copy of the
        list, counts until one with the guider's own comes.
        """
        is_same_step = _same(x, self._x) and _same(timestep, self._timestep)
        if model is not self._guider.inner_model or not is_same_step:
            return {}
        found = {}
        for name in (COND, UNCOND):
            entries = self._guider.conds.get(name)
            likeness = [_likeness(cond, entries) for cond in conds]
            best = max(likeness, default=0)
            rank = 2 * best + (options is self.options) if best else 0
            if rank > self._claims.get(name, 0):
                self._claims[name], found[name] = rank, likeness.index(best)
        if found:
            self._number = next(_numbers)
        return found

    @contextmanager
    def with_text(self, name: str, entries: Any) -> Iterator[None]:
        """Evaluate a method's text in the block, at the place of the own call in progress."""
        before = self.call
        if before is not None:
            self.call = replace(before, conds={name: entries})
        try:
            yield
        finally:
            self.call = before

    def keep(self, own: Mapping[str, int], denoised: Sequence[Tensor]) -> None:
        """Keep the predictions of a call's own branches."""
        self.predictions.update((name, denoised[index]) for name, index in own.items())

    @contextmanager
    def windows_of(self, own: Mapping[str, int]) -> Iterator[None]:
        """Make the calls in the block windows of one evaluation of these branches."""
        before, self._in_windows = self._in_windows, own
        try:
            yield
        finally:
            self._in_windows = before


def cond_scale(guider: Any) -> float:
    """Return the guider's CFG scale; 1 for guiders that have only a positive branch."""
    return float(getattr(guider, "cfg1", guider.cfg))


class _Windows(ContextHandlerABC):
    """The host's context windows, with their fused result kept: in each window the host passes copies."""

    def __init__(self, handler: Any, branches: Branches) -> None:
        self._handler, self._branches = handler, branches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    def should_use_context(self, *args: Any, **kwargs: Any) -> bool:
        return bool(self._handler.should_use_context(*args, **kwargs))

    def get_resized_cond(self, *args: Any, **kwargs: Any) -> Any:
        return self._handler.get_resized_cond(*args, **kwargs)

    def execute(
        self,
        calc_cond_batch: Any,
        model: Any,
        conds: list[Any],
        x_in: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
    ) -> Any:
        own = self._branches.claim(model, conds, x_in, timestep, model_options)
        with self._branches.windows_of(own):
            fused = self._handler.execute(calc_cond_batch, model, conds, x_in, timestep, model_options)
        self._branches.keep(own, fused)
        return fused


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _likeness(cond: Any, entries: Any) -> int:
    """Return 2 for the guider's own list, 1 for a copy of it with the same entries, and 0 for another."""
    if cond is None or not entries:
        return 0
    if cond is entries:
        return 2
    return int([entry.get("uuid") for entry in cond] == [entry.get("uuid") for entry in entries])
