"""One scheduler for the corrections of all methods on a model, with state that lives as long as a sampling run.

A node attaches corrections to a MODEL. While the host samples, every model evaluation ends here with the denoised
prediction of whatever guider is in use. First the active corrections may steer: change the run's conditioning and have the
prediction made anew. Then they get it together with the extra predictions they asked for (evaluated in one batch for the
samples that need them, identical texts once), and their changes are summed under a joint cap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...guidance.composition import Change, SigmaClock, combine, per_sample
from ...guidance.noise_level import NoiseLevel
from ...guidance.trace import Trace
from . import doctor
from .correction import COND, KEY, UNCOND, Correction, Evaluation, RunContext, Step
from .parts import Leftovers
from .traces import Recorder, TraceStore
from .under_node import error_shown, executing_node

TRACES = "safe_guidance_traces"
LEFTOVERS = "safe_guidance_leftovers"


def attach(model: ModelPatcher, correction: Correction) -> ModelPatcher:
    """A clone of `model` whose sampling runs include `correction`, in addition to those attached before."""
    patched = model.clone()
    attached: tuple[Correction, ...] = patched.model_options.get(KEY, ())
    patched.model_options[KEY] = (*attached, correction)
    # Stores of its own: the same corrections under another node's are another model, with other runs.
    patched.model_options[TRACES], patched.model_options[LEFTOVERS] = TraceStore(), Leftovers()
    if not attached:
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
    correction.node = executing_node()
    correction.patch(patched)
    return patched


def unguarded(model: ModelPatcher) -> ModelPatcher:
    """A clone of `model` whose sampling runs include no correction."""
    bare = model.clone()
    bare.model_options[KEY] = ()
    return bare


def trace_of(model: ModelPatcher, samples: Tensor) -> Trace | None:
    """What the corrections of this MODEL did in the run that gave these latent samples; None when it did not sample them."""
    store: TraceStore | None = model.model_options.get(TRACES)
    return None if store is None else store.find(samples)


def noise_level(model_sampling: Any, sigma: Tensor) -> NoiseLevel:
    """The forward process at a sampler's sigma, from the host's own way of adding noise, whatever the model family."""
    one, zero = torch.ones(1, 1, device=sigma.device), torch.zeros(1, 1, device=sigma.device)
    sigma = sigma[:1].float()
    signal = model_sampling.noise_scaling(sigma, zero, one)
    noise = model_sampling.noise_scaling(sigma, one, zero)
    return NoiseLevel(signal.item(), noise.item())


class Run:
    """State of one sampling run."""

    def __init__(self, corrections: Sequence[Correction], context: RunContext, guider: Any) -> None:
        self._corrections = corrections
        self._context = context
        self._clock = SigmaClock()
        self._text_keys: dict[tuple[int, str], str] = {}
        self._branches: dict[str, Tensor] | None = None
        self._register_texts(guider)
        self._guider = guider
        self.recorder = Recorder([correction.name for correction in corrections])
        self._states = [self._begun(correction, context) for correction in corrections]

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
            self._branches.update((name, out) for cond, out in zip(conds, denoised) if cond is not None and cond is entries)

    def predict(self, guiders: Callable[[], Tensor], evaluation: Evaluation) -> Tensor:
        """The prediction with the changes of all corrections that are active at this noise level."""
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
            return Step(evaluation.x, sigma, level, denoised, predictions, _cond_scale(evaluation.guider), mask, is_new)

        for index in active:
            with self.recorder.spending(index):
                rows = self._corrections[index].steer(step(branches), self._states[index], evaluation)
                if rows is not None and bool(rows.any()):
                    anew, new_branches = self._listen(guiders)
                    self.recorder.changed(index, Change(anew - denoised, rows), denoised)
                    denoised = _where_rows(rows, anew, denoised)
                    branches = {name: _where_rows(rows, out, branches[name]) for name, out in new_branches.items()}
        predictions = self._predict_texts({i: step(branches) for i in active}, evaluation)
        changes = []
        for index in active:
            with self.recorder.spending(index), error_shown(self._corrections[index].node):
                change = self._corrections[index].correct(step({**branches, **predictions[index]}), self._states[index])
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

    def _predict_texts(self, steps: Mapping[int, Step], evaluation: Evaluation) -> dict[int, dict[str, Tensor]]:
        """By correction, the predictions it asked for, in one batched evaluation of the rows that any correction asked for."""
        wanted: dict[tuple[int, str], str] = {}
        rows = None
        for index, step in steps.items():
            for name, of_name in self._corrections[index].wanted_texts(step, self._states[index]).items():
                if name not in step.predictions and bool(of_name.any()):
                    key = self._text_keys.get((index, name), name)
                    if evaluation.guider.conds.get(key) is None:
                        self.recorder.notes.append(doctor.missing_branch(self._corrections[index].name))
                        continue
                    if name == UNCOND:
                        self.recorder.notes.append(doctor.costly_branch(self._corrections[index].name))
                    wanted[index, name] = key
                    rows = of_name if rows is None else rows | of_name
        by_key = {} if rows is None else self._predict_keys(wanted, rows, evaluation)
        denoised = next(iter(steps.values())).denoised
        return {i: {n: _scattered(by_key[k], rows, denoised) for (j, n), k in wanted.items() if j == i and rows is not None} for i in steps}

    def _predict_keys(self, wanted: Mapping[tuple[int, str], str], rows: Tensor, evaluation: Evaluation) -> dict[str, Tensor]:
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
    predicted = comfy.samplers.calc_cond_batch(evaluation.guider.inner_model, conds, x, timestep, evaluation.model_options)
    return {key: out if len(out) < len(rows) or bool(rows.all()) else out[rows] for key, out in zip(keys, predicted)}


def _serves_any_row(entry: dict[str, Any]) -> bool:
    """Whether a prepared conditioning has nothing that belongs to certain rows of the batch."""
    tensors = [getattr(cond, "cond", None) for cond in entry.get("model_conds", {}).values()] + [entry.get("mask")]
    return "control" not in entry and all(len(t) == 1 for t in tensors if isinstance(t, Tensor) and t.ndim > 0)


def _scattered(values: Tensor, rows: Tensor, denoised: Tensor) -> Tensor:
    """`denoised` with `values` in the given rows."""
    return denoised.to(values.dtype).clone().index_copy_(0, rows.nonzero()[:, 0].to(values.device), values)


def _same_conditioning(a: list[Any], b: list[Any]) -> bool:
    """Whether two conditionings are the same text: equal embeddings, and options that are equal or the same objects."""
    if a is b:
        return True
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0]) and x[1].keys() == y[1].keys() and all(_same_value(x[1][k], y[1][k]) for k in x[1]) for x, y in zip(a, b)
    )


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b or (isinstance(a, str | int | float) and a == b)


def _outer_sample(
    executor: Callable[..., Tensor],
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *args: Any,
    latent_shapes: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> Tensor:
    guider = executor.class_obj  # type: ignore[attr-defined]
    if latent_shapes is not None:
        if len(latent_shapes) > 1:
            raise ValueError("Safe Guidance does not work on models that sample several latents at once. Remove its nodes from this MODEL.")
        kwargs["latent_shapes"] = latent_shapes
    corrections: tuple[Correction, ...] = guider.model_options[KEY]
    if not corrections:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    context = RunContext(guider.model_patcher, tuple(noise.shape), latent_image, denoise_mask)
    # The guider's options are a copy made for this run: what is put there reaches every hook and ends with the run.
    run = guider.model_options["transformer_options"][KEY] = Run(corrections, context, guider)
    leftovers: Leftovers = guider.model_options[LEFTOVERS]
    before = leftovers.find(noise, latent_image, sigmas)
    if before is not None:
        run.resume(before)
    samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    run.recorder.notes += doctor.inert_notes(corrections, run.recorder.trace())
    guider.model_options[TRACES].keep(samples, run.recorder)
    leftovers.keep(samples, sigmas, run.carried())
    doctor.tell(corrections, run.recorder.trace())
    return samples


def _predict_noise(
    executor: Callable[..., Tensor], x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
) -> Tensor:
    model_options = model_options or {}
    run: Run | None = model_options["transformer_options"].get(KEY)
    if run is None:
        return executor(x, timestep, model_options, seed)
    evaluation = Evaluation(executor.class_obj, x, timestep, model_options)  # type: ignore[attr-defined]
    return run.predict(lambda: executor(x, timestep, model_options, seed), evaluation)


def _calc_cond_batch(
    executor: Callable[..., list[Tensor]], model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    denoised = executor(model, conds, x, timestep, model_options)
    # A guider of two models evaluates one of them with options of its own, which know no run.
    run: Run | None = model_options["transformer_options"].get(KEY)
    if run is not None:
        run.record(conds, denoised)
    return denoised
