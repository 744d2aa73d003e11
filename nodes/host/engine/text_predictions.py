"""Extra predictions for texts of corrections: each text once, in one batch, for the samples that need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from . import diagnostics
from .caches import without_caches
from .correction import COND, KEY, UNCOND, Correction, Step
from .text_entries import Entry, inherited, register_hooks, same_entries
from .traces import Recorder


class TextPredictions:
    """The texts of a run's corrections, registered with the guider.

    A text is that of the branch which it is compared with, in other words (see `text_entries`). The host
    prepares conditionings that the guider holds like its own: areas, timestep ranges, ControlNet.
    """

    def __init__(self, corrections: Sequence[Correction], guider: Any, recorder: Recorder) -> None:
        self._corrections, self._guider, self._recorder = corrections, guider, recorder
        self._keys: dict[tuple[int, str], str] = {}
        branches = {name: list(guider.conds.get(name) or ()) for name in (COND, UNCOND)}
        # The prediction of the negative branch serves a text that says the same. The positive one may be
        # steered away from the text that it began with.
        self._known = {UNCOND: branches[UNCOND]} if branches[UNCOND] else {}
        for index, correction in enumerate(corrections):
            branch = correction.compared_with if branches[correction.compared_with] else COND
            for name, conditioning in correction.texts.items():
                entries = inherited(conditioning, branches[branch], branch)
                self._keys[index, name] = self._register(entries)

    def _register(self, entries: list[Entry]) -> str:
        """Return the guider's key of a text, which is another one's if both say the same."""
        register_hooks(self._guider, entries)
        for key, known in self._known.items():
            if same_entries(entries, known):
                return key
        key = f"{KEY}_{len(self._known)}"
        self._known[key] = self._guider.conds[key] = entries
        return key

    def conditioning(self, index: int, name: str) -> list[dict[str, Any]]:
        """Return a text of the correction with this index, as the host prepared it."""
        entries: list[dict[str, Any]] = self._guider.conds[self._keys[index, name]]
        return entries

    def predict(self, wanted: Mapping[int, Mapping[str, Tensor]], step: Step) -> dict[int, dict[str, Tensor]]:
        """Evaluate the texts that corrections ask for, in one batch of the rows that any of them asks for.

        Args:
            wanted: by index of the correction and name of the text, the images (F,) bool that need it.
            step: the evaluation; its `predictions` are there already.

        Returns:
            By index and name, (F, C, h, w), equal to `step.denoised` in images that were not evaluated.
        """
        found = self._known_already(wanted, step)
        keys, images = self._missing(wanted, step)
        if images is None:
            return found
        samples = step.frames.samples(images)  # (B,) bool
        # Each conditioning is charged to the correction that asked for it first.
        first: dict[str, int] = {}
        for (index, _), key in keys.items():
            first.setdefault(key, index)
        with self._recorder.spending(*first.values()):
            by_key = _predict_samples(list(first), samples, step)
        rows = step.frames.of_samples(samples)  # (F,) bool
        for key, index in first.items():
            if key not in (COND, UNCOND) and _is_that_of_a_branch(by_key[key], rows, step):
                self._recorder.note(index, diagnostics.cached_text(self._recorder.methods[index]))
        for (index, name), key in keys.items():
            found[index][name] = _scattered(by_key[key], rows, step.denoised)
        return found

    def _known_already(
        self, wanted: Mapping[int, Mapping[str, Tensor]], step: Step
    ) -> dict[int, dict[str, Tensor]]:
        """Return the branch's own prediction for every text that says the same as the branch, by index."""
        return {
            index: {
                name: step.predictions[self._keys[index, name]]
                for name in of_correction
                if self._keys.get((index, name)) in step.predictions
            }
            for index, of_correction in wanted.items()
        }

    def _missing(
        self, wanted: Mapping[int, Mapping[str, Tensor]], step: Step
    ) -> tuple[dict[tuple[int, str], str], Tensor | None]:
        """Return the guider's keys of the missing predictions, and the images (F,) bool that need any."""
        keys: dict[tuple[int, str], str] = {}
        needed: Tensor | None = None
        for index, of_correction in wanted.items():
            for name, rows in of_correction.items():
                key = self._keys.get((index, name), name)
                if key in step.predictions or not bool(rows.any()):
                    continue
                if step.guider.conds.get(key) is None:
                    self._recorder.note(index, diagnostics.missing_branch(self._recorder.methods[index]))
                    continue
                if name == UNCOND:
                    method = self._recorder.methods[index]
                    self._recorder.note(index, diagnostics.costly_branch(method, step.cond_scale))
                keys[index, name] = key
                needed = rows if needed is None else needed | rows
        return keys, needed


def _predict_samples(keys: list[str], rows: Tensor, step: Step) -> dict[str, Tensor]:
    """Return the images (R, C, h, w) of the predictions under `keys` for some samples of the batch.

    All samples are evaluated if a conditioning differs between them.
    """
    conds = [step.guider.conds[key] for key in keys]
    x, timestep = step.latent, step.timestep
    is_whole_batch = bool(rows.all())
    if not is_whole_batch and all(_serves_any_row(entry) for cond in conds for entry in cond):
        x, timestep = x[rows], timestep[rows]
    predicted = comfy.samplers.calc_cond_batch(
        step.guider.inner_model, conds, x, timestep, without_caches(step.model_options)
    )
    chosen = [out if len(out) < len(rows) or is_whole_batch else out[rows] for out in predicted]
    return {key: step.frames.images(out) for key, out in zip(keys, chosen)}


def _is_that_of_a_branch(predicted: Tensor, rows: Tensor, step: Step) -> bool:
    """Return True if a text's prediction (R, C, h, w) equals a branch's in the R rows to the last bit."""
    branches = [step.predictions[name] for name in (COND, UNCOND) if name in step.predictions]
    return any(torch.equal(predicted, branch[rows.to(branch.device)]) for branch in branches)


def _serves_any_row(entry: dict[str, Any]) -> bool:
    """Return True if nothing in a prepared conditioning belongs to certain rows of the batch."""
    values = [getattr(cond, "cond", None) for cond in entry.get("model_conds", {}).values()]
    values.append(entry.get("mask"))
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim > 0]
    return "control" not in entry and all(len(tensor) == 1 for tensor in tensors)


def _scattered(values: Tensor, rows: Tensor, denoised: Tensor) -> Tensor:
    """Return `denoised` (B, C, h, w) with `values` (R, C, h, w) in the R rows that are True."""
    indices = rows.nonzero()[:, 0].to(values.device)
    return denoised.to(values.dtype).clone().index_copy_(0, indices, values)
