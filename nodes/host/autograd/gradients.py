"""Gradients of a function of the denoised prediction with respect to the text embeddings or the noisy latent.

The function is scalar. Its gradient with respect to the prediction is computed first (see `decoders`) and its
graph is freed. One vector-Jacobian product of the sampled network follows. Memory holds one network's
activations at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor, nn

from ..engine.correction import COND, Step
from .conditioning_entries import Entry, copy_for_rows, swapped_conds
from .differentiable_layers import differentiable
from .gradient_pass import FUNCTION_AROUND, run_gradient_pass
from .ordinary_tensors import ordinary


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
    _refuse_hooks(entries, "Text embeddings cannot be guided")
    cotangent = step.frames.with_images(torch.zeros_like(step.latent[rows]), cotangent)
    chosen, cotangent = _whole_batch_if_needed(entries, rows, cotangent, len(step.latent))

    def run(model_options: dict[str, Any]) -> list[Tensor | None]:
        with differentiable(*_networks(step, entries), checkpointed=checkpointed):
            leaves = [None if v is None else v[chosen].clone().requires_grad_(True) for v in values]
            entries_of_rows = [
                copy_for_rows(e, chosen, len(step.latent), leaf) for e, leaf in zip(entries, leaves)
            ]
            x, timestep = step.latent[chosen].clone(), step.timestep[chosen].clone()
            predicted = comfy.samplers.calc_cond_batch(
                step.guider.inner_model, [entries_of_rows], x, timestep, model_options
            )[0]
            wanted = [leaf for leaf in leaves if leaf is not None]
            if not predicted.requires_grad:
                if FUNCTION_AROUND in model_options:
                    raise RuntimeError("another node has answered from a cache")
                return [None] * len(leaves)  # no entry is active at this noise level
            found = iter(
                torch.autograd.grad(
                    predicted, wanted, ordinary(cotangent).to(predicted.dtype), allow_unused=True
                )
            )
            return [None if leaf is None else next(found) for leaf in leaves]

    gradients = run_gradient_pass(run, step)
    return [g if g is None or len(g) == len(rows) else g[rows] for g in gradients]


def latent_gradient(step: Step, cotangent: Tensor, rows: Tensor, checkpointed: bool = False) -> Tensor:
    """Return d(sum(cotangent * guider's prediction)) / d(noisy latent) through all branches of the guider.

    Returns:
        (n, C, h, w) for the n rows.

    Raises:
        ValueError: gradients do not flow through this model.
    """
    guider, batch = step.guider, len(step.latent)
    entries: list[Entry] = [entry for cond in guider.conds.values() if cond for entry in cond]
    _refuse_hooks(
        entries,
        "Safe Data Guidance cannot pass gradients through the model",
        ", or switch the cheap gradient on, which needs none",
    )
    cotangent = step.frames.with_images(torch.zeros_like(step.latent[rows]), cotangent)
    chosen, cotangent = _whole_batch_if_needed(entries, rows, cotangent, batch)

    def run(model_options: dict[str, Any]) -> Tensor:
        # Solvers record the unconditional prediction through these: the gradient pass must not overwrite it.
        model_options.pop("sampler_post_cfg_function", None)
        with differentiable(*_networks(step, entries), checkpointed=checkpointed):
            conds = {
                k: [copy_for_rows(e, chosen, batch, None) for e in cond] if cond else cond
                for k, cond in guider.conds.items()
            }
            leaf = step.latent[chosen].clone().requires_grad_(True)
            with swapped_conds(guider, conds):
                predicted = guider.predict_noise(leaf, step.timestep[chosen].clone(), model_options, None)
            return torch.autograd.grad(predicted, leaf, ordinary(cotangent).to(predicted.dtype))[0]

    gradient = run_gradient_pass(run, step)
    return step.frames.images(gradient if len(gradient) == len(rows) else gradient[rows])


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


def _refuse_hooks(entries: list[Entry], refused: str, instead: str = "") -> None:
    """Raise an error if hooks change weights, which are no longer loaded when the backward pass needs them.

    Args:
        entries: the conditioning that the gradient goes through.
        refused: sentence beginning about the method that asked.
        instead: what else its user can do.
    """
    if any(entry.get("hooks") is not None for entry in entries):
        raise ValueError(
            f"{refused} while hooks change the model's weights during sampling. "
            f"Load the LoRA into the model instead of attaching it to the conditioning{instead}."
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
