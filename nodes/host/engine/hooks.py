"""Corrections on a MODEL: attaching them, and the host's hooks that call them in its sampling runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....reports.trace import Trace
from . import diagnostics
from .caches import call_afresh
from .correction import KEY, Attachment, Correction, RunContext
from .frames import Frames
from .node_messages import executing_node
from .resume import ResumePoint, store_of
from .run import Run
from .traces import TraceStore
from .two_pass import Callback, FirstPass, FirstPassEnd, sample_in_two_passes

TRACES = "safe_guidance_traces"


def attach(model: ModelPatcher, correction: Correction) -> ModelPatcher:
    """Return a clone of `model` whose sampling runs include `correction`, after those attached before."""
    patched = model.clone()
    attached: tuple[Attachment, ...] = patched.model_options.get(KEY, ())
    if not attached:
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
    new = Attachment(correction, executing_node(), correction.patch(patched))
    patched.model_options[KEY] = (*attached, new)
    # Each patched MODEL has its own traces, because its runs are not those of the model it was cloned from.
    patched.model_options[TRACES] = TraceStore()
    return patched


def unguarded(model: ModelPatcher) -> ModelPatcher:
    """Return a clone of `model` whose sampling runs include no correction."""
    bare = model.clone()
    bare.model_options[KEY] = ()
    return bare


def trace_of(model: ModelPatcher, samples: Tensor) -> Trace | None:
    """Return the trace of this MODEL's run that gave these latents; None if it did not sample them."""
    store: TraceStore | None = model.model_options.get(TRACES)
    return None if store is None else store.find(samples)


@dataclass(frozen=True)
class _SamplerCall:
    """One call of the host's sampling function, ready to be made from a start latent with a callback."""

    executor: Callable[..., Tensor]
    noise: Tensor
    sampler: Any
    sigmas: Tensor
    denoise_mask: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, start: Tensor, callback: Callback | None) -> Tensor:
        return self.executor(
            self.noise,
            start,
            self.sampler,
            self.sigmas,
            self.denoise_mask,
            callback,
            *self.args,
            **self.kwargs,
        )


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
    if latent_shapes is not None:
        kwargs["latent_shapes"] = latent_shapes
    guider = executor.class_obj  # type: ignore[attr-defined]
    call = _SamplerCall(executor, noise, sampler, sigmas, denoise_mask, args, kwargs)
    attachments: tuple[Attachment, ...] = guider.model_options[KEY]
    if not attachments:
        return call(latent_image, callback)
    frames = Frames.of(latent_shapes or (noise.shape,))
    mask = None if denoise_mask is None else frames.images(denoise_mask)
    context = RunContext(guider.model_patcher, frames, latent_image, mask)
    resume_store = store_of(guider.model_patcher)
    resumed = resume_store.find(noise, latent_image, sigmas)
    run, samples, first_pass = _sample(call, attachments, context, guider, callback, resumed)
    corrections = tuple(attachment.correction for attachment in attachments)
    resume_store.keep(samples, sigmas, ResumePoint(corrections, tuple(run.resume_data()), first_pass))
    states = [run.state_of(correction) for correction in corrections]
    diagnostics.add_remarks(attachments, states, run.recorder)
    diagnostics.add_inert_notes(attachments, run.recorder)
    guider.model_options[TRACES].keep(samples, run.recorder)
    diagnostics.show_messages(attachments, run.recorder)
    return samples


def _sample(
    call: _SamplerCall,
    attachments: tuple[Attachment, ...],
    context: RunContext,
    guider: Any,
    callback: Callback | None,
    resumed: ResumePoint | None,
) -> tuple[Run, Tensor, FirstPassEnd | None]:
    """Sample in one pass or in two; return the run, its latents and the end of the first of two passes."""
    corrections = [attachment.correction for attachment in attachments]

    def sample_pass(
        start: Tensor, callback: Callback | None, first_pass: FirstPass | None
    ) -> tuple[Run, Tensor]:
        run = Run(attachments, context, guider, first_pass)
        if resumed is not None:
            run.resume(resumed.data_for(corrections))
        # The guider's options are a copy for this run: the entry reaches every hook and ends with the run.
        guider.model_options["transformer_options"][KEY] = run
        return run, call(start, _reported_to(run, callback))

    if any(correction.two_pass for correction in corrections):
        previous = None if resumed is None else resumed.first_pass_for(corrections)
        return sample_in_two_passes(sample_pass, guider, context.latent, callback, previous)
    return *sample_pass(context.latent, callback, None), None


def _reported_to(run: Run, callback: Callback | None) -> Callback:
    """Return a callback for the host that tells the run about every step of the sampler."""

    def report(step: int, x0: Any, x: Any, steps: int) -> None:
        run.end_step()
        if callback is not None:
            callback(step, x0, x, steps)

    return report


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
    guider = executor.class_obj  # type: ignore[attr-defined]

    def forward(options: dict[str, Any], is_afresh: bool) -> Tensor:
        if is_afresh:
            return call_afresh(executor, guider, x, timestep, options, seed)
        return executor(x, timestep, options, seed)

    return run.predict(forward, guider, x, timestep, model_options)


def _calc_cond_batch(
    executor: Callable[..., list[Tensor]],
    model: Any,
    conds: list[Any],
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any],
) -> list[Tensor]:
    # A guider of two models evaluates one of them with options of its own, which know no run.
    run: Run | None = model_options["transformer_options"].get(KEY)
    if run is None:
        return executor(model, conds, x, timestep, model_options)
    return run.evaluate(executor, model, conds, x, timestep, model_options)
