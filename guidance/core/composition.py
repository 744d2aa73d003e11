"""Composition of several methods' changes of one denoised prediction, and the clock of their state."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """The change that one method adds to a denoised prediction.

    Attributes:
        delta: (B, C, h, w), to be added.
        active: (B,) bool, False for samples that the method does not change; they must come out
            bit-identical.
        cap: upper bound of the norm of all capped changes together, as a share of the prediction's norm.
            Infinite for methods that are guidance terms, whose size depends on the guidance scale.
        gate: (B,) in [0, 1], how far each sample's gate is open, for the trace; None means fully open where
            active.
        area: (B,) in [0, 1], the share of each image that is changed, for the trace; None means all of it.
        weight: (B,), the method's own multiplier of the change, for the trace; None means its gate.
    """

    delta: Tensor
    active: Tensor
    cap: float = math.inf
    gate: Tensor | None = None
    area: Tensor | None = None
    weight: Tensor | None = None


def sample_norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of every sample, at least 1e-6, shaped to broadcast with x."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_min(1e-6).view(-1, *[1] * (x.ndim - 1))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) values to broadcast with `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def where_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` in some rows (B,) bool and `old` in the others."""
    return torch.where(per_sample(rows.to(new.device), new), new, old)


def capped(delta: Tensor, denoised: Tensor, cap: float) -> Tensor:
    """Scale every sample of `delta` down to at most `cap` times the norm of its prediction."""
    return delta * (cap * sample_norm(denoised) / sample_norm(delta)).clamp(max=1)


def within_noise(change: Change, sigma: float) -> Change:
    """Scale a change down to at most the root mean square `sigma`, the size of the noise in the latent.

    A sampler that goes up from a noise level s to t multiplies a change by (s - t) / s. Without a limit, what
    is small beside an image is a multiple of the noise where un-sampling begins.
    """
    size = per_sample(change.delta.flatten(1).square().mean(1).sqrt().clamp_min(1e-12), change.delta)
    return replace(change, delta=change.delta * (sigma / size).clamp(max=1))


def _order_free_sum(deltas: Sequence[Tensor]) -> Tensor:
    """Sum deltas independently of their order, to the last bit: terms are sorted element by element."""
    if len(deltas) == 1:
        return deltas[0]
    return torch.stack(list(deltas)).sort(dim=0).values.sum(dim=0)


def _where_active(change: Change) -> Tensor:
    return torch.where(per_sample(change.active, change.delta), change.delta, torch.zeros_like(change.delta))


def combine(denoised: Tensor, changes: Sequence[Change], mask: Tensor | None = None) -> Tensor:
    """Add all changes, each computed from the same uncorrected prediction.

    Capped changes add up to at most the largest cap.

    Args:
        denoised: (B, C, h, w) prediction.
        changes: any number, in any order.
        mask: where changes may act, in [0, 1], broadcastable to `denoised`.

    Returns:
        The corrected prediction. Samples for which no change is active are copied bit by bit.
    """
    if not changes:
        return denoised
    active = torch.stack([change.active for change in changes]).any(dim=0)
    if not bool(active.any()):
        return denoised
    bounded = [change for change in changes if not math.isinf(change.cap)]
    deltas = [_where_active(change) for change in changes if math.isinf(change.cap)]
    if bounded:
        together = _order_free_sum([_where_active(change) for change in bounded])
        if len(bounded) > 1:
            together = capped(together, denoised.to(together.dtype), max(change.cap for change in bounded))
        deltas.append(together)
    delta = _order_free_sum(deltas)
    if mask is not None:
        delta = delta * mask.to(delta.dtype)
    corrected = (denoised.to(delta.dtype) + delta).to(denoised.dtype)
    return torch.where(per_sample(active, denoised), corrected, denoised)


class SigmaClock:
    """Clock that lets the state of a method advance once per noise level that a sampler arrives at.

    It goes by the order of the evaluations. Solvers of higher order evaluate the model several times a step,
    and may return to a noise level within the step: that is no new time. A sampler that adds noise again
    (restarts, ancestral steps, a schedule that rises) arrives at a noise level that the step has not
    evaluated: that is a new time, also where the run has been before.
    """

    SAME = 1e-5
    """Relative tolerance between equal noise levels: some solvers compute them anew from their logarithm."""
    LONGEST_STEP = 12
    """Most evaluations that are remembered of one step, for samplers that do not report their steps."""

    def __init__(self) -> None:
        self._last = math.nan
        self._step: deque[float] = deque(maxlen=self.LONGEST_STEP)

    def advance(self, sigma: float) -> bool:
        """Return whether an evaluation at `sigma` is a new time; if so, remember it as the last one."""
        is_old = any(math.isclose(sigma, level, rel_tol=self.SAME) for level in (*self._step, self._last))
        self._step.append(sigma)
        if not is_old:
            self._last = sigma
        return not is_old

    def end_step(self) -> None:
        """Begin the next step of the sampler, which reports a step after its first evaluation."""
        self._step.clear()
