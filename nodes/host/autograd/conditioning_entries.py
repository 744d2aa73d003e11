"""Entries of a run's conditioning: their text embeddings, and copies of them for a gradient pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import comfy.utils
import torch
from torch import Tensor

from ..engine.correction import COND, KEY, Step
from .ordinary_tensors import ordinary

Entry = dict[str, Any]
OWN = f"{KEY}_own"
"""Key of an entry whose embedding has changed: the host's entry that it was made from."""


def embeddings(step: Step) -> list[Tensor | None]:
    """Return the text embeddings (B, tokens, width) float32 of every positive entry of the run.

    An entry without a text embedding gives None.
    """
    batch = len(step.latent)

    def of(entry: Entry) -> Tensor | None:
        cond = entry["model_conds"].get("c_crossattn")
        return None if cond is None else comfy.utils.repeat_to_batch_size(cond.cond, batch).float()

    return [of(entry) for entry in step.guider.conds[COND]]


def set_embeddings(step: Step, values: list[Tensor | None]) -> None:
    """Use these embeddings for the rest of the run. The workflow's conditioning is not changed.

    A changed entry gets another identifier, because caches know predictions by it. An entry that returns to
    the prompt's own embedding becomes the host's entry again.
    """
    entries = step.guider.conds[COND]
    for index, (now, value) in enumerate(zip(embeddings(step), values)):
        if value is None or now is None or torch.equal(now, value):
            continue
        own: Entry = entries[index].get(OWN, entries[index])
        cond = own["model_conds"]["c_crossattn"].cond
        is_own = torch.equal(
            comfy.utils.repeat_to_batch_size(cond, len(step.latent)).float().to(value), value
        )
        renamed = {**with_embedding(entries[index], value), "uuid": uuid4(), OWN: own}
        entries[index] = own if is_own else renamed


def copy_for_rows(entry: Entry, rows: Tensor, batch: int, embedding: Tensor | None) -> Entry:
    """Return a copy of a conditioning's entry for some rows, with tensors that autograd may save.

    Args:
        entry: of a batch.
        rows: (n,) row numbers.
        batch: number of rows of the batch.
        embedding: (n, tokens, width) in place of the entry's own text embedding, or None for its own.
    """
    conds = {
        name: cond._copy_with(_of_rows(cond.cond, rows, batch)) for name, cond in entry["model_conds"].items()
    }
    copy = {**entry, "model_conds": conds}
    if isinstance(entry.get("mask"), Tensor):
        copy["mask"] = _of_rows(entry["mask"], rows, batch)
    return copy if embedding is None else with_embedding(copy, embedding)


def _of_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Return the rows of a tensor for the batch, or of a list of them; other values are for all rows."""
    if isinstance(value, list):
        return [_of_rows(element, rows, batch) for element in value]
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch and batch > 1:
        return value[rows.to(value.device)].clone()
    return ordinary(value)


def with_embedding(entry: Entry, embedding: Tensor) -> Entry:
    """Return a copy of a conditioning's entry with another text embedding (B, tokens, width)."""
    conds = entry["model_conds"]
    return {**entry, "model_conds": {**conds, "c_crossattn": conds["c_crossattn"]._copy_with(embedding)}}


@contextmanager
def swapped_conds(guider: Any, conds: dict[str, Any]) -> Iterator[None]:
    """Let a guider use other conditionings inside a `with` block."""
    before, guider.conds = guider.conds, conds
    try:
        yield
    finally:
        guider.conds = before
