"""One scheduler for the corrections of all methods, with state that lives as long as a sampling run.

Every model evaluation of a run ends here with the denoised prediction of whatever guider is in use. First the active
corrections may steer: change the run's conditioning and have the prediction made anew. Then they get it together with the
extra predictions they asked for (evaluated in one batch for the samples that need them, identical texts once), and their
changes are summed under a joint cap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ....guidance.core.composition import Change, SigmaClock, combine, per_sample
from ....guidance.core.noise_level import NoiseLevel
from . import diagnostics
from .correction import COND, KEY, UNCOND, Correction, Evaluation, RunContext, Step
from .node_messages import error_shown
from .traces import Recorder
from .two_pass import Rehearsal


def noise_level(model_sampling: Any, sigma: Tensor) -> NoiseLevel:
    """The forward process at a sampler's sigma, from the host's own way of adding noise, whatever the model family."""
    one, zero = torch.ones(1, 1, device=sigma.device), torch.zeros(1, 1, device=sigma.device)
    sigma = sigma[:1].float()
    signal = model_sampling.noise_scaling(sigma, zero, one)
    noise = model_sampling.noise_scaling(sigma, one, zero)
    return NoiseLevel(signal.item(), noise.item())


class Run:
    """State of one sampling run."""

    def __init__(
        self,
        corrections: Sequence[Correction],
        context: RunContext,
        guider: Any,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self._corrections = corrections
        self._rehearsal = rehearsal
        # In a rehearsal those that asked for it only watch.
        is_rehearsal = rehearsal is not None and not rehearsal.is_over
        self._watchers = [
            i for i, correction in enumerate(corrections) if is_rehearsal and correction.rehearses
        ]
        self._context = context
        self._clock = SigmaClock()
        self._text_keys: dict[tuple[int, str], str] = {}
        self._branches: dict[str, Tensor] | None = None
        self._register_texts(guider)
        self._guider = guider
        self.recorder = Recorder([correction.name for correction in corrections])
        seen = {} if rehearsal is None else rehearsal.states
        self._states = [
            seen[i] if i in seen else self._begun(correction, context)
            for i, correction in enumerate(corrections)
        ]

    @staticmethod
    def _begun(correction: Correction, context: RunContext) -> Any:
        with error_shown(correction.node):
            return correction.begin(context)

    def _register_texts(self, guider: Any) -> None:
        # Conditionings that the guider holds are prepared by the host like its own: areas, timestep ranges, ControlNet.
        known: list[tuple[list[Any], str]] = []
        for index, correction in enumerate(self._corrections):
            for name, conditioning in correction.texts.items():
                key = next((key for other, key in known if _same_conditioning(conditioning, other)), None)
                if key is None:
                    key = f"{KEY}_{len(known)}"
                    known.append((conditioning, key))
                    guider.conds[key] = comfy.sampler_helpers.convert_cond(conditioning)
                    for entry in guider.conds[key]:
                        entry.setdefault("prompt_type", "positive")
                self._text_keys[index, name] = key

    def resume(self, carried: Sequence[Any]) -> None:
        """Go on where another run stopped, with what each correction carried out of it."""
        for correction, state, value in zip(self._corrections, self._states, carried):
            if value is not None:
                correction.resume(state, value)

    def carried(self) -> list[Any]:
        """What each correction carries into a run that goes on where this one stopped."""
        return [correction.carried(state) for correction, state in zip(self._corrections, self._states)]

    @property
    def guider(self) -> Any:
        """The guider whose predictions are corrected."""
        return self._guider

    def state_of(self, correction: Correction) -> Any:
        """What a correction made when the run began, for its hooks inside the model."""
        return next(state for c, state in zip(self._corrections, self._states) if c is correction)

    def conditioning(self, correction: Correction, name: str) -> list[dict[str, Any]]:
        """One of a correction's `texts`, as the host prepared it for this run."""
        index = self._corrections.index(correction)
        entries: list[dict[str, Any]] = self._guider.conds[self._text_keys[index, name]]
        return entries

    def charged_to(self, correction: Correction) -> AbstractContextManager[None]:
        """What happens inside is charged to a correction that acts inside the model."""
        return self.recorder.spending(self._corrections.index(correction))

    def note_change(self, correction: Correction, change: Change, before: Tensor) -> None:
        """Record what a correction changed inside the model."""
        self.recorder.changed(self._corrections.index(correction), change, before)

    @property
    def is_guiders_forward(self) -> bool:
        """Whether the model is being evaluated for the guider itself, not for a method's extra prediction."""
        return self._branches is not None

    def record(self, conds: Sequence[Any], denoised: Sequence[Tensor]) -> None:
        """Count the predictions, and keep those of the guider's own branches while it evaluates them."""
        self.recorder.forwards += sum(len(out) for cond, out in zip(conds, denoised) if cond is not None)
        if self._branches is None:
            return
        for name in (COND, UNCOND):
            entries = self._guider.conds.get(name)
            self._branches.update(
                (name, out) for cond, out in zip(conds, denoised) if cond is not None and cond is entries
            )

    def rehearsed(self) -> tuple[dict[int, Any], list[Tensor]]:
        """What the corrections that watched this rehearsal know, and the regions in which they will act."""
        states = {i: self._states[i] for i in self._watchers}
        regions = [self._corrections[i].region(state) for i, state in states.items()]
        return states, [region for region in regions if region is not None]

    def predict(self, guiders: Callable[[], Tensor], evaluation: Evaluation) -> Tensor:
        """The prediction with the changes of all corrections that are active at this noise level."""
        corrected = self._corrected(guiders, evaluation)
        return (
            corrected
            if self._rehearsal is None
            else self._rehearsal.settled(float(evaluation.timestep[0]), corrected)
        )

    def _corrected(self, guiders: Callable[[], Tensor], evaluation: Evaluation) -> Tensor:
        sigma = float(evaluation.timestep[0])
        level = noise_level(evaluation.guider.inner_model.model_sampling, evaluation.timestep)
        is_new = self._clock.advance(sigma)
        active = [i for i, correction in enumerate(self._corrections) if correction.is_active(level)]
        self.recorder.call(sigma, len(evaluation.x), active)
        if not active:
            return guiders()
        denoised, branches = self._listen(guiders)
        mask = self._context.denoise_mask

        def step(predictions: Mapping[str, Tensor]) -> Step:
            return Step(
                evaluation.x,
                sigma,
                level,
                denoised,
                predictions,
                _cond_scale(evaluation.guider),
                mask,
                is_new,
            )

        watching = [i for i in self._watchers if i in active]
        active = [i for i in active if i not in watching]
        for index in active:
            with self.recorder.spending(index):
                rows = self._corrections[index].steer(step(branches), self._states[index], evaluation)
                if rows is not None and bool(rows.any()):
                    anew, new_branches = self._listen(guiders)
                    self.recorder.changed(index, Change(anew - denoised, rows), denoised)
                    denoised = _where_rows(rows, anew, denoised)
                    branches = {
                        name: _where_rows(rows, out, branches[name]) for name, out in new_branches.items()
                    }
        for index in watching:
            with self.recorder.spending(index):
                self._corrections[index].watch(step(branches), self._states[index])
        predictions = self._predict_texts({i: step(branches) for i in active}, evaluation)
        changes = []
        for index in active:
            with self.recorder.spending(index), error_shown(self._corrections[index].node):
                change = self._corrections[index].correct(
                    step({**branches, **predictions[index]}), self._states[index]
                )
            if change is not None:
                self.recorder.changed(index, change, denoised)
                changes.append(change)
        return combine(denoised, changes, mask)

    def _listen(self, guiders: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The guider's prediction, and those of its branches."""
        branches = self._branches = {}
        try:
            return guiders(), branches
        finally:
            self._branches = None

    def _predict_texts(
        self, steps: Mapping[int, Step], evaluation: Evaluation
    ) -> dict[int, dict[str, Tensor]]:
        """By correction, the predictions it asked for, in one batched evaluation of the rows that any correction asked for."""
        wanted: dict[tuple[int, str], str] = {}
        rows = None
        for index, step in steps.items():
            for name, of_name in self._corrections[index].wanted_texts(step, self._states[index]).items():
                if name not in step.predictions and bool(of_name.any()):
                    key = self._text_keys.get((index, name), name)
                    if evaluation.guider.conds.get(key) is None:
                        self.recorder.notes.append(diagnostics.missing_branch(self._corrections[index].name))
                        continue
                    if name == UNCOND:
                        self.recorder.notes.append(diagnostics.costly_branch(self._corrections[index].name))
                    wanted[index, name] = key
                    rows = of_name if rows is None else rows | of_name
        if rows is None:
            return {i: {} for i in steps}
        by_key = self._predict_keys(wanted, rows, evaluation)
        denoised = next(iter(steps.values())).denoised
        return {
            i: {n: _scattered(by_key[k], rows, denoised) for (j, n), k in wanted.items() if j == i}
            for i in steps
        }

    def _predict_keys(
        self, wanted: Mapping[tuple[int, str], str], rows: Tensor, evaluation: Evaluation
    ) -> dict[str, Tensor]:
        # Each conditioning is charged to the correction that asked for it first.
        first: dict[str, int] = {}
        for (index, _), key in wanted.items():
            first.setdefault(key, index)
        with self.recorder.spending(*first.values()):
            return _predict_rows(list(first), rows, evaluation)


def _cond_scale(guider: Any) -> float:
    """How strongly the guider's prediction follows its positive branch; 1 for guiders that have only that."""
    return float(getattr(guider, "cfg1", guider.cfg))


def _where_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(per_sample(rows.to(new.device), new), new, old)


def _predict_rows(keys: list[str], rows: Tensor, evaluation: Evaluation) -> dict[str, Tensor]:
    """Predictions of the conditionings under `keys`, of some rows only where those do not differ between rows."""
    conds = [evaluation.guider.conds[key] for key in keys]
    x, timestep = evaluation.x, evaluation.timestep
    if not bool(rows.all()) and all(_serves_any_row(entry) for cond in conds for entry in cond):
        x, timestep = x[rows], timestep[rows]
    predicted = comfy.samplers.calc_cond_batch(
        evaluation.guider.inner_model, conds, x, timestep, evaluation.model_options
    )
    return {
        key: out if len(out) < len(rows) or bool(rows.all()) else out[rows]
        for key, out in zip(keys, predicted)
    }


def _serves_any_row(entry: dict[str, Any]) -> bool:
    """Whether a prepared conditioning has nothing that belongs to certain rows of the batch."""
    tensors = [getattr(cond, "cond", None) for cond in entry.get("model_conds", {}).values()] + [
        entry.get("mask")
    ]
    return "control" not in entry and all(
        len(t) == 1 for t in tensors if isinstance(t, Tensor) and t.ndim > 0
    )


def _scattered(values: Tensor, rows: Tensor, denoised: Tensor) -> Tensor:
    """`denoised` with `values` in the given rows."""
    return denoised.to(values.dtype).clone().index_copy_(0, rows.nonzero()[:, 0].to(values.device), values)


def _same_conditioning(a: list[Any], b: list[Any]) -> bool:
    """Whether two conditionings are the same text: equal embeddings, and options that are equal or the same objects."""
    if a is b:
        return True
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0])
        and x[1].keys() == y[1].keys()
        and all(_same_value(x[1][k], y[1][k]) for k in x[1])
        for x, y in zip(a, b)
    )


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b or (isinstance(a, str | int | float) and a == b)
