"""A sampling run: the state of its corrections, and the correction of every model evaluation.

Every evaluation arrives here as the denoised prediction of the guider in use. The active corrections may
first steer: they change the run's conditioning, and the prediction is made again. Then they observe it and
ask for extra predictions, which are evaluated in one batch. At last their changes are added under a joint
cap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from ....guidance.core.composition import Change, SigmaClock, combine, where_rows, within_noise
from .branches import Branches, OwnCall, cond_scale
from .caches import changed_rows, without_caches
from .correction import Attachment, Correction, RunContext, Step
from .diagnostics import limited_by_noise, unmoved_prediction
from .node_messages import errors_shown_at
from .schedule import SchedulePosition, noise_level
from .text_predictions import TextPredictions
from .traces import Recorder
from .two_pass import FirstPass

GuiderForward = Callable[[dict[str, Any], bool], Tensor]
"""Function that evaluates the guider with the host's options in the sampler's shape; if True, uncached."""


class Run:
    """State of one sampling run, of one pass if it has two.

    Attributes:
        guider: the guider whose predictions are corrected.
        recorder: records what each correction does.
    """

    def __init__(
        self,
        attachments: Sequence[Attachment],
        context: RunContext,
        guider: Any,
        first_pass: FirstPass | None = None,
    ) -> None:
        self._attachments = attachments
        self._corrections = [attachment.correction for attachment in attachments]
        self._first_pass = first_pass
        self._denoise_mask = context.denoise_mask
        self._frames = context.frames
        self._clock = SigmaClock()
        self._position = SchedulePosition()
        self._branches: Branches | None = None
        self.guider = guider
        self.recorder = Recorder([correction.name for correction in self._corrections])
        self._texts = TextPredictions(self._corrections, guider, self.recorder)
        in_first_pass = first_pass is not None and not first_pass.is_finished
        self._observers = [i for i, c in enumerate(self._corrections) if in_first_pass and c.two_pass]
        known = {} if first_pass is None else first_pass.states
        self._states = [
            known[i] if i in known else self._begin(attachment, context)
            for i, attachment in enumerate(attachments)
        ]

    @staticmethod
    def _begin(attachment: Attachment, context: RunContext) -> Any:
        with errors_shown_at(attachment.node):
            return attachment.correction.begin(replace(context, resources=attachment.resources))

    def resume(self, data: Sequence[Any]) -> None:
        """Continue from another run, given the `resume_data` of every correction."""
        for correction, state, value in zip(self._corrections, self._states, data):
            if value is not None:
                correction.resume(state, value)

    def resume_data(self) -> list[Any]:
        """Return every correction's data for a run that continues where this one stopped."""
        return [correction.resume_data(state) for correction, state in zip(self._corrections, self._states)]

    def end_first_pass(self) -> tuple[dict[int, Any], list[Tensor]]:
        """Return the states of the corrections that only observed, by index, and their regions."""
        states = {i: self._states[i] for i in self._observers}
        regions = [self._corrections[i].end_first_pass(state) for i, state in states.items()]
        return states, [region for region in regions if region is not None]

    def state_of(self, correction: Correction) -> Any:
        """Return the state of a correction, for its hooks inside the model."""
        return next(state for c, state in zip(self._corrections, self._states) if c is correction)

    def conditioning(self, correction: Correction, name: str) -> list[dict[str, Any]]:
        """Return one of a correction's `texts`, as the host prepared it for this run."""
        return self._texts.conditioning(self._corrections.index(correction), name)

    def end_step(self) -> None:
        """Note that the sampler has reported a step, after its first evaluation."""
        self._clock.end_step()

    def charged_to(self, correction: Correction) -> AbstractContextManager[None]:
        """Charge the cost of the block to a correction that acts inside the model."""
        return self.recorder.spending(self._corrections.index(correction))

    def note_change(self, correction: Correction, change: Change, before: Tensor) -> None:
        """Record what a correction changed inside the model."""
        self.recorder.changed(self._corrections.index(correction), change, before)

    @property
    def own_call(self) -> OwnCall | None:
        """Return the model call in progress if it evaluates the guider's own branches.

        None for calls of other nodes, extra predictions and gradient passes. Hooks inside the model read it.
        """
        return None if self._branches is None else self._branches.call

    def evaluating_text(self, name: str, entries: Any) -> AbstractContextManager[None]:
        """Evaluate a method's text in the block, at the place of the own call in progress."""
        return nullcontext() if self._branches is None else self._branches.with_text(name, entries)

    def evaluate(
        self,
        call: Callable[..., list[Tensor]],
        model: Any,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
    ) -> list[Tensor]:
        """Make one call of the host's `calc_cond_batch`; count its predictions and keep the guider's own."""
        if (branches := self._branches) is None:
            denoised = call(model, conds, x, timestep, options)
        else:
            with branches.evaluating(model, conds, x, timestep, options) as own:
                denoised = call(model, conds, x, timestep, options)
            branches.keep(own, denoised)
        self.recorder.forwards += sum(len(out) for cond, out in zip(conds, denoised) if cond is not None)
        return denoised

    def predict(
        self, forward: GuiderForward, guider: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> Tensor:
        """Return the prediction with the changes of all active corrections, in the sampler's shape."""
        sigma = float(timestep[0])
        level = noise_level(guider.inner_model.model_sampling, timestep)
        is_new = self._clock.advance(sigma)
        # Without noise there is no direction to guide, and directions divide by the noise level.
        active = [i for i, c in enumerate(self._corrections) if sigma > 0 and c.is_active(level)]
        self.recorder.call(sigma, len(noisy := self._frames.images(x)), active)
        if active:
            own = Branches(guider, x, timestep, model_options)
            latent, branches = self._evaluate_guider(forward, own)
            denoised = self._frames.images(latent)
            step = Step(
                x=noisy,
                latent=x,
                frames=self._frames,
                timestep=timestep,
                sigma=sigma,
                level=level,
                denoised=denoised,
                predictions=branches,
                guider=guider,
                model_options=model_options,
                cond_scale=cond_scale(guider),
                denoise_mask=self._denoise_mask,
                is_new=is_new,
            )
            corrected = self._correct(step, active, forward)
        else:
            latent = forward(model_options, False)
            corrected = denoised = self._frames.images(latent)
        if self._first_pass is not None:
            corrected = self._first_pass.apply(sigma, corrected)
        return latent if corrected is denoised else self._frames.with_images(latent, corrected)

    def _correct(self, step: Step, active: Sequence[int], forward: GuiderForward) -> Tensor:
        """Call the hooks of the active corrections; in a first pass, two-pass corrections only observe."""
        acting = [i for i in active if i not in self._observers]
        for index in acting:
            step = self._steer(index, step, forward)
        for index in active:
            with self._hook_of(index):
                self._corrections[index].observe(step, self._states[index])
        predictions = self._predict_wanted_texts(acting, step)
        schedule = step.model_options.get("transformer_options", {}).get("sample_sigmas")
        adds_noise = self._position.rises(step.sigma, schedule)
        changes = []
        for index in acting:
            own_step = replace(step, predictions={**step.predictions, **predictions[index]})
            with self._hook_of(index):
                change = self._corrections[index].correct(own_step, self._states[index])
            if change is not None and adds_noise:
                self.recorder.note(index, limited_by_noise(self.recorder.methods[index]))
                change = within_noise(change, step.sigma)
            if change is not None:
                self.recorder.changed(index, change, step.denoised)
                changes.append(change)
        for index in reversed(acting):
            with self._hook_of(index):
                self._corrections[index].finish(step, self._states[index])
        return combine(step.denoised, changes, step.denoise_mask)

    def _steer(self, index: int, step: Step, forward: GuiderForward) -> Step:
        """Let a correction steer; return the step with a new prediction in the rows that it named."""
        with self._hook_of(index):
            samples = self._corrections[index].steer(step, self._states[index])  # (B,) bool
            if samples is None or not bool(samples.any()):
                return step
            rows = self._frames.of_samples(samples)  # (F,) bool
            own = Branches(step.guider, step.latent, step.timestep, without_caches(step.model_options))
            latent, branches = self._evaluate_guider(forward, own, True)
            again = self._frames.images(latent)
            change = Change(again - step.denoised, changed_rows(again, step.denoised, rows))
            if not bool((change.active == rows).all()):
                self.recorder.note(index, unmoved_prediction(self.recorder.methods[index]))
            self.recorder.changed(index, change, step.denoised)
            return replace(
                step,
                denoised=where_rows(rows, again, step.denoised),
                # A cache may have answered before, and no branch: the other rows' texts are as they were.
                predictions={
                    name: where_rows(rows, out, step.predictions.get(name, out))
                    for name, out in branches.items()
                },
            )

    def _predict_wanted_texts(self, acting: Sequence[int], step: Step) -> Mapping[int, Mapping[str, Tensor]]:
        """Return the predictions that each correction asked for, by index and name."""
        wanted = {}
        for index in acting:
            with self._hook_of(index):
                wanted[index] = self._corrections[index].wanted_texts(step, self._states[index])
        return self._texts.predict(wanted, step)

    @contextmanager
    def _hook_of(self, index: int) -> Iterator[None]:
        """Charge the block to a correction, and show its errors at the node that attached it."""
        with self.recorder.spending(index), errors_shown_at(self._attachments[index].node):
            yield

    def _evaluate_guider(
        self, forward: GuiderForward, branches: Branches, is_afresh: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the guider's prediction in the sampler's shape, and the images of its branches by name."""
        self._branches = branches
        try:
            latent = forward(branches.options, is_afresh)
            return latent, {name: self._frames.images(out) for name, out in branches.predictions.items()}
        finally:
            self._branches = None
