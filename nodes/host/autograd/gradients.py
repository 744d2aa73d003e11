"""Gradients of a function of the denoised prediction with respect to the text embeddings or the noisy latent.

The function is scalar. Its gradient with respect to the prediction is computed first (see `decoders`) and its
graph is freed. One vector-Jacobian product of the sampled network follows. Memory holds one network's
activations at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..engine.caches import is_cache
from ..engine.correction import COND, KEY, Step
from .differentiable_layers import differentiable, ordinary

OWN = f"{KEY}_own"
"""Key of an entry whose embedding has changed: the host's entry that it was made from."""
COMPILED = "torch.compile"
"""Key of the host's wrappers that compile, which a gradient pass runs without."""

GRADIENT_MEMORY = 3
"""Memory of a gradient pass relative to sampling: it keeps activations that sampling frees at once."""

Entry = dict[str, Any]


def reserve_memory(model: ModelPatcher) -> None:
    """Have the host leave memory for a gradient pass when it decides how much of the weights to load."""
    if model.get_wrappers(WrappersMP.PREPARE_SAMPLING, KEY):
        return

    def prepare(
        executor: Callable[..., Any],
        patcher: ModelPatcher,
        noise_shape: Sequence[int],
        *args: Any,
        **options: Any,
    ) -> Any:
        return executor(patcher, [GRADIENT_MEMORY * noise_shape[0], *noise_shape[1:]], *args, **options)

    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)


def embeddings(step: Step) -> list[Tensor | None]:
    """Return the text embeddings (B, tokens, width) float32 of every positive entry of the run.

    An entry without a text embedding gives None.
    """
    batch = len(step.x)

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
        is_own = torch.equal(comfy.utils.repeat_to_batch_size(cond, len(step.x)).float().to(value), value)
        renamed = {**_with_embedding(entries[index], value), "uuid": uuid4(), OWN: own}
        entries[index] = own if is_own else renamed


def text_gradients(
    step: Step,
    values: list[Tensor | None],
    cotangent: Tensor,
    rows: Tensor,
    checkpointed: bool = False,
) -> list[Tensor | None]:
    """Return d(sum(cotangent * positive branch's prediction)) / d(embedding), for some rows of the batch.

    Args:
        step: the model step.
        values: embeddings (B, tokens, width) as `embeddings` returns them; None where no gradient is needed.
        cotangent: (n, C, h, w), for the n rows.
        rows: (n,) row numbers.
        checkpointed: use less memory and more time.

    Returns:
        (n, tokens, width) for every entry that the prediction depends on, else None.

    Raises:
        ValueError: gradients do not flow through this model.
    """
    entries: list[Entry] = step.guider.conds[COND]
    _refuse_hooks(entries)
    chosen, cotangent = _whole_batch_if_needed(entries, rows, cotangent, len(step.x))

    def run(model_options: dict[str, Any]) -> list[Tensor | None]:
        with differentiable(*_networks(step, entries), checkpointed=checkpointed):
            leaves = [None if v is None else v[chosen].clone().requires_grad_(True) for v in values]
            prepared = [_prepared(e, chosen, len(step.x), leaf) for e, leaf in zip(entries, leaves)]
            x, timestep = step.x[chosen].clone(), step.timestep[chosen].clone()
            predicted = comfy.samplers.calc_cond_batch(
                step.guider.inner_model, [prepared], x, timestep, model_options
            )[0]
            wanted = [leaf for leaf in leaves if leaf is not None]
            if not predicted.requires_grad:  # no entry is active at this noise level
                return [None] * len(leaves)
            found = iter(
                torch.autograd.grad(
                    predicted, wanted, ordinary(cotangent).to(predicted.dtype), allow_unused=True
                )
            )
            return [None if leaf is None else next(found) for leaf in leaves]

    gradients = _attempt(run, step)
    return [g if g is None or len(g) == len(rows) else g[rows] for g in gradients]


def latent_gradient(step: Step, cotangent: Tensor, rows: Tensor, checkpointed: bool = False) -> Tensor:
    """Return d(sum(cotangent * guider's prediction)) / d(noisy latent) through all branches of the guider.

    Returns:
        (n, C, h, w) for the n rows.

    Raises:
        ValueError: gradients do not flow through this model.
    """
    guider, batch = step.guider, len(step.x)
    entries: list[Entry] = [entry for cond in guider.conds.values() if cond for entry in cond]
    _refuse_hooks(entries)
    chosen, cotangent = _whole_batch_if_needed(entries, rows, cotangent, batch)

    def run(model_options: dict[str, Any]) -> Tensor:
        # Solvers record the unconditional prediction through these: the gradient pass must not overwrite it.
        model_options.pop("sampler_post_cfg_function", None)
        with differentiable(*_networks(step, entries), checkpointed=checkpointed):
            conds = {
                k: [_prepared(e, chosen, batch, None) for e in cond] if cond else cond
                for k, cond in guider.conds.items()
            }
            leaf = step.x[chosen].clone().requires_grad_(True)
            with _swapped_conds(guider, conds):
                predicted = guider.predict_noise(leaf, step.timestep[chosen].clone(), model_options, None)
            return torch.autograd.grad(predicted, leaf, ordinary(cotangent).to(predicted.dtype))[0]

    gradient = _attempt(run, step)
    return gradient if len(gradient) == len(rows) else gradient[rows]


def in_parts(rows: Tensor, compute: Callable[[Tensor, bool], list[Tensor | None]]) -> list[Tensor | None]:
    """Compute all rows at once or, when memory does not suffice, row by row with checkpoints.

    `compute(rows, checkpointed)` returns tensors whose first dimension is that of the rows.
    """
    try:
        return compute(rows, False)
    except Exception as error:
        if not comfy.model_management.is_oom(error):
            raise
    logging.info(
        "Safe Guidance: not enough memory for gradients of %d images at once, going on one by one.", len(rows)
    )
    comfy.model_management.soft_empty_cache()
    parts = [compute(row[None], True) for row in rows]
    return [None if columns[0] is None else torch.cat(columns) for columns in zip(*parts)]


def _networks(step: Step, entries: list[Entry]) -> Iterator[nn.Module]:
    """Yield the sampled network and the networks of the ControlNets that its predictions depend on."""
    yield step.guider.inner_model.diffusion_model
    for control in {id(e["control"]): e["control"] for e in entries if e.get("control") is not None}.values():
        while control is not None:
            network = getattr(control, "control_model", None)
            if isinstance(network, nn.Module):
                yield network
            control = control.previous_controlnet


def _refuse_hooks(entries: list[Entry]) -> None:
    if any(entry.get("hooks") is not None for entry in entries):
        # Weights that differ between conditionings are no longer loaded when the backward pass needs them.
        raise ValueError(
            "Text embeddings cannot be guided while hooks change the model's weights during sampling. "
            "Load the LoRA into the model instead of attaching it to the conditioning."
        )


def _whole_batch_if_needed(
    entries: list[Entry], rows: Tensor, cotangent: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """Return the rows to evaluate and their cotangent.

    A ControlNet assigns its hints by position in the batch, so with a ControlNet all rows are evaluated.
    """
    if len(rows) == batch or all(entry.get("control") is None for entry in entries):
        return rows, cotangent
    whole = cotangent.new_zeros(batch, *cotangent.shape[1:])
    whole[rows] = cotangent
    return torch.arange(batch, device=rows.device), whole


def _of_rows(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, list):
        return [_of_rows(element, rows, batch) for element in value]
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch and batch > 1:
        return value[rows.to(value.device)].clone()
    return ordinary(value)


def _prepared(entry: Entry, rows: Tensor, batch: int, embedding: Tensor | None) -> Entry:
    """Copy a conditioning's entry for some rows, with tensors that autograd may save."""
    conds = {
        name: cond._copy_with(_of_rows(cond.cond, rows, batch)) for name, cond in entry["model_conds"].items()
    }
    copy = {**entry, "model_conds": conds}
    if isinstance(entry.get("mask"), Tensor):
        copy["mask"] = _of_rows(entry["mask"], rows, batch)
    return copy if embedding is None else _with_embedding(copy, embedding)


def _with_embedding(entry: Entry, embedding: Tensor) -> Entry:
    conds = entry["model_conds"]
    return {**entry, "model_conds": {**conds, "c_crossattn": conds["c_crossattn"]._copy_with(embedding)}}


@contextmanager
def _swapped_conds(guider: Any, conds: dict[str, Any]) -> Iterator[None]:
    before, guider.conds = guider.conds, conds
    try:
        yield
    finally:
        guider.conds = before


def _attempt(run: Callable[[dict[str, Any]], Any], step: Step) -> Any:
    """Run a gradient pass with other packs' patches, and without them if they cannot be differentiated."""
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
        f"Gradients do not flow through this model ({str(failure).splitlines()[0]}). "
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
    return options
