"""Corrections on a MODEL: attaching them, and the host's hooks through which they take part in its sampling runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....reports.trace import Trace
from . import diagnostics
from .correction import KEY, Correction, Evaluation, RunContext
from .node_messages import executing_node
from .resume import Leftovers, Rehearsed
from .run import Run
from .traces import TraceStore
from .two_pass import Callback, Rehearsal, Unseen

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


def _outer_sample(
    executor: Callable[..., Tensor],
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    callback: Callback | None = None,
    *args: Any,
    latent_shapes: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> Tensor:
    guider = executor.class_obj  # type: ignore[attr-defined]
    if latent_shapes is not None:
        if len(latent_shapes) > 1:
            raise ValueError(
                "Safe Guidance does not work on models that sample several latents at once. Remove its nodes from this MODEL."
            )
        kwargs["latent_shapes"] = latent_shapes
    corrections: tuple[Correction, ...] = guider.model_options[KEY]
    if not corrections:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs)
    context = RunContext(guider.model_patcher, tuple(noise.shape), latent_image, denoise_mask)
    leftovers: Leftovers = guider.model_options[LEFTOVERS]
    before = leftovers.find(noise, latent_image, sigmas)

    def sampled(
        start: Tensor, callback: Callback | None, rehearsal: Rehearsal | None = None
    ) -> tuple[Run, Tensor]:
        # The guider's options are a copy made for this run: what is put there reaches every hook and ends with the run.
        run = guider.model_options["transformer_options"][KEY] = Run(corrections, context, guider, rehearsal)
        if before is not None:
            run.resume(before.carried)
        return run, executor(noise, start, sampler, sigmas, denoise_mask, callback, *args, **kwargs)

    rehearsed = None
    if any(correction.rehearses for correction in corrections):
        earlier = None if before is None else before.rehearsed
        run, samples, rehearsed = _sampled_after_rehearsal(sampled, guider, latent_image, callback, earlier)
    else:
        run, samples = sampled(latent_image, callback)
    run.recorder.notes += diagnostics.inert_notes(corrections, run.recorder.trace())
    guider.model_options[TRACES].keep(samples, run.recorder)
    leftovers.keep(samples, sigmas, run.carried(), rehearsed)
    diagnostics.tell(corrections, run.recorder.trace())
    return samples


def _sampled_after_rehearsal(
    sampled: Callable[[Tensor, Callback | None, Rehearsal], tuple[Run, Tensor]],
    guider: Any,
    latent_image: Tensor,
    callback: Callback | None,
    earlier: Rehearsed | None,
) -> tuple[Run, Tensor, Rehearsed | None]:
    """The run, its latents and the rehearsal's; the rehearsal is the run when there is nothing to do after it.

    The rehearsal of a part of an image goes on where the `earlier` one of the part before stopped.
    """
    conds = {name: [entry.copy() for entry in entries] for name, entries in guider.conds.items()}
    device, unseen, rehearsal = guider.model_patcher.load_device, Unseen(callback), Rehearsal()
    # Samplers that draw from the global generators must draw the same again.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run, samples = sampled(latent_image if earlier is None else earlier.samples, unseen, rehearsal)
    states, regions = run.rehearsed()
    if earlier is not None:
        regions.append(earlier.region)
    if not regions:
        unseen.show()
        return run, samples, None
    region = torch.stack(regions).any(0)
    rehearsal.end(region, states)
    predictions, rehearsed, guider.conds = run.recorder.forwards, Rehearsed(samples, region), conds
    run, samples = sampled(latent_image, callback, rehearsal)
    run.recorder.rehearsal = predictions
    return run, samples, rehearsed


def _predict_noise(
    executor: Callable[..., Tensor],
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> Tensor:
    model_options = model_options or {}
    run: Run | None = model_options["transformer_options"].get(KEY)
    if run is None:
        return executor(x, timestep, model_options, seed)
    evaluation = Evaluation(executor.class_obj, x, timestep, model_options)  # type: ignore[attr-defined]
    return run.predict(lambda: executor(x, timestep, model_options, seed), evaluation)


def _calc_cond_batch(
    executor: Callable[..., list[Tensor]],
    model: Any,
    conds: list[Any],
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any],
) -> list[Tensor]:
    denoised = executor(model, conds, x, timestep, model_options)
    # A guider of two models evaluates one of them with options of its own, which know no run.
    run: Run | None = model_options["transformer_options"].get(KEY)
    if run is not None:
        run.record(conds, denoised)
    return denoised
