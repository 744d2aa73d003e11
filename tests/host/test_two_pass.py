"""Two-pass sampling: what the second pass keeps, what it costs, and what the user sees of the first pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from demo_prompts import HEART, STAR
from safe_guidance.guidance.core.composition import Change
from safe_guidance.guidance.core.noise_level import SigmaWindow

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

LEFT = torch.arange(32) < 12
"""Columns that the test's method may change."""


@pytest.fixture
def methods(host: Any) -> Any:
    from safe_guidance.nodes.host.engine import hooks

    class Push(hooks.Correction):
        """Correction that scales every prediction up."""

        name = "Push"

        def __init__(self, amount: float = 0.2) -> None:
            self.amount = amount

        def is_active(self, level: Any) -> bool:
            return True

        def correct(self, step: Any, state: Any) -> Change:
            return Change(self.amount * step.denoised, step.every_row)

    class TwoPass(Push):
        """Two-pass correction of some rows: it changes the whole image, but its region is the left side."""

        name = "Two-pass"
        two_pass = True

        def __init__(self, rows: list[bool], window: SigmaWindow | None = None) -> None:
            super().__init__()
            self.rows, self.window, self.begun, self.steps = (
                torch.tensor(rows),
                window or SigmaWindow(),
                0,
                [],
            )

        def begin(self, context: Any) -> Any:
            self.begun += 1
            return SimpleNamespace(sigmas=[], is_decided=False)

        def is_active(self, level: Any) -> bool:
            return level in self.window

        def observe(self, step: Any, state: Any) -> None:
            if not state.is_decided:
                state.sigmas.append(step.sigma)

        def end_first_pass(self, state: Any) -> torch.Tensor | None:
            self.steps, state.is_decided = list(state.sigmas), True
            columns = LEFT.expand(len(self.rows), 1, 32, 32)
            return columns & self.rows[:, None, None, None] if bool(self.rows.any()) else None

        def correct(self, step: Any, state: Any) -> Change:
            assert state.sigmas == self.steps, "the second pass continues with the state of the first one"
            return Change(self.amount * step.denoised, self.rows)

    class Steers(Push):
        """Correction that replaces the positive conditioning at the first step."""

        def __init__(self, conditioning: list[Any]) -> None:
            self.texts = {"target": conditioning}

        def begin(self, context: Any) -> dict[str, bool]:
            return {"done": False}

        def steer(self, step: Any, state: dict[str, bool]) -> torch.Tensor | None:
            if state["done"]:
                return None
            state["done"] = True
            conds = step.guider.conds
            conds["positive"] = next(entries for key, entries in conds.items() if key.startswith(hooks.KEY))
            return step.every_row

        def correct(self, step: Any, state: Any) -> Change | None:
            return None

    return SimpleNamespace(
        attach=hooks.attach, trace=hooks.trace_of, Push=Push, TwoPass=TwoPass, Steers=Steers
    )


def same_outside(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a[..., ~LEFT], b[..., ~LEFT])


CFG_PP = (
    "euler_cfg_pp",
    "euler_ancestral_cfg_pp",
    "dpmpp_2m_cfg_pp",
    "res_multistep_cfg_pp",
    "gradient_estimation_cfg_pp",
)


@pytest.mark.parametrize(
    "sampler",
    ["euler", "dpmpp_2m", "heun", "dpm_2", "euler_ancestral", "dpmpp_2m_sde", "uni_pc", "lcm", *CFG_PP],
)
def test_the_rest_of_the_image_stays_to_the_last_bit(host: Any, methods: Any, sampler: str) -> None:
    text = host.text(STAR, HEART)
    plain = host.sample(host.model, text, sampler=sampler)
    changed = host.sample(methods.attach(host.model, methods.TwoPass([True, False])), text, sampler=sampler)
    assert torch.equal(changed[1], plain[1])
    assert same_outside(changed, plain) and not torch.equal(changed[0], plain[0])


def test_one_pass_does_not_keep_the_rest_of_the_image(host: Any, methods: Any) -> None:
    """The model sees the whole image, so a change on the left affects the right."""
    text = host.text(STAR)

    class OnTheLeft(methods.Push):
        def correct(self, step: Any, state: Any) -> Change:
            return Change(self.amount * step.denoised * LEFT, step.every_row)

    plain = host.sample(host.model, text)
    assert not same_outside(host.sample(methods.attach(host.model, OnTheLeft()), text), plain)


def test_without_a_region_the_first_pass_is_the_result(host: Any, methods: Any) -> None:
    text = host.text(STAR, HEART)
    plain, plain_rows = host.count_calls(host.model)
    baseline = host.sample(plain, text)
    model, rows = host.count_calls(methods.attach(host.model, methods.TwoPass([False, False])))
    assert torch.equal(host.sample(model, text), baseline)
    assert rows == plain_rows
    assert methods.trace(model, baseline).rehearsal == 0


def test_the_first_pass_observes_inside_the_window_and_is_counted(host: Any, methods: Any) -> None:
    method = methods.TwoPass([True], SigmaWindow(high=5.0, low=1.0))
    model, rows = host.count_calls(methods.attach(host.model, method))
    samples = host.sample(model, host.text(STAR), steps=10)
    trace = methods.trace(model, samples)
    assert method.begun == 1
    assert method.steps == [sigma for sigma in trace.sigmas if 1 <= sigma <= 5] and len(trace.sigmas) == 10
    assert trace.rehearsal == 20 and trace.rehearsal + trace.forwards == sum(rows)
    assert [record.call for record in trace.records] == [
        i for i, sigma in enumerate(trace.sigmas) if 1 <= sigma <= 5
    ]


def test_other_methods_act_in_the_first_pass(host: Any, methods: Any) -> None:
    text = host.text(STAR)
    pushed = methods.attach(host.model, methods.Push(0.05))
    alone, both = (
        host.sample(model, text) for model in (pushed, methods.attach(pushed, methods.TwoPass([True])))
    )
    assert same_outside(alone, both) and not torch.equal(alone, both)


def test_the_second_pass_starts_with_the_original_conditioning(host: Any, methods: Any) -> None:
    text = host.text(STAR)
    steered = methods.attach(host.model, methods.Steers(host.text(HEART)))
    alone, both = (
        host.sample(model, text) for model in (steered, methods.attach(steered, methods.TwoPass([True])))
    )
    assert same_outside(alone, both) and not torch.equal(alone, both)


def test_the_region_is_the_union_of_all_methods(host: Any, methods: Any) -> None:
    text = host.text(STAR, HEART)
    model = methods.attach(
        methods.attach(host.model, methods.TwoPass([True, False])), methods.TwoPass([False, True])
    )
    plain, changed = host.sample(host.model, text), host.sample(model, text)
    assert same_outside(plain, changed)
    assert [torch.equal(a, b) for a, b in zip(plain, changed)] == [False, False]


def test_inpainting_keeps_its_mask(host: Any, methods: Any) -> None:
    text = host.text(STAR)
    latent = {"samples": host.sample(host.model, host.text(HEART)), "noise_mask": torch.zeros(1, 1, 128, 128)}
    latent["noise_mask"][..., 64:, :] = 1.0
    plain = host.sample(host.model, text, latent)
    changed = host.sample(methods.attach(host.model, methods.TwoPass([True])), text, latent)
    assert same_outside(plain, changed) and not torch.equal(plain, changed)
    assert torch.equal(plain[..., :16, :], changed[..., :16, :])


def guided(
    host: Any, model: Any, seed: int | None, callback: Any = None, sampler: str = "euler_ancestral"
) -> torch.Tensor:
    """Sample with a guider of its own, as custom samplers do."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(host.text(STAR), host.text(""))
    guider.set_cfg(5.0)
    sigmas = comfy.samplers.calculate_sigmas(host.model.get_model_object("model_sampling"), "karras", 4)
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    chosen = comfy.samplers.sampler_object(sampler)
    return guider.sample(
        noise, torch.zeros_like(noise), chosen, sigmas, callback=callback, disable_pbar=True, seed=seed
    )


def test_both_passes_draw_the_same_random_numbers_without_a_seed(host: Any, methods: Any) -> None:
    def sampled(model: Any) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return guided(host, model, seed=None)

    assert same_outside(sampled(methods.attach(host.model, methods.TwoPass([True]))), sampled(host.model))


@pytest.mark.parametrize(("rows", "steps_shown"), [([True], [0, 1, 2, 3]), ([False], [3])])
def test_the_first_pass_is_not_previewed(
    host: Any, methods: Any, rows: list[bool], steps_shown: list[int]
) -> None:
    """A preview would show the unwanted image. If the first pass is the result, its last step is shown."""
    seen: list[tuple[int, torch.Tensor]] = []
    model = methods.attach(host.model, methods.TwoPass(rows))
    samples = guided(host, model, 1, lambda step, x0, x, steps: seen.append((step, x0)))
    assert [step for step, _ in seen] == steps_shown
    assert torch.equal(host.model.model.process_latent_out(seen[-1][1]), samples)


def test_an_adaptive_sampler_finishes_and_logs_a_warning(
    host: Any, methods: Any, caplog: pytest.LogCaptureFixture
) -> None:
    samples = guided(host, methods.attach(host.model, methods.TwoPass([True])), 1, sampler="dpm_adaptive")
    assert bool(samples.isfinite().all())
    assert caplog.text.count("chooses its own steps") == 1


def test_resumed_runs_keep_the_rest_of_the_image(host: Any, methods: Any) -> None:
    """Both passes resume where those of the previous run stopped, also if this run has no region."""
    text = host.text(STAR, HEART)
    plain = host.sample_in_parts(host.model, text, (0, 3, 6))
    model = methods.attach(host.model, methods.TwoPass([True, False]))
    assert same_outside(host.sample_in_parts(model, text, (0, 3, 6)), plain)
    early = methods.TwoPass([True, False])
    early.end_first_pass = lambda state: (
        methods.TwoPass.end_first_pass(early, state)
        if len(state.sigmas) == 3 and state.sigmas[0] > 10
        else None
    )
    early.correct = lambda step, state: (
        methods.TwoPass.correct(early, step, state) if state.sigmas[0] > 10 else None
    )
    changed = host.sample_in_parts(methods.attach(host.model, early), text, (0, 3, 6))
    assert same_outside(changed, plain)
    assert [torch.equal(a, b) for a, b in zip(changed, plain)] == [False, True]


def test_the_cost_of_the_first_pass_is_shown_at_the_two_pass_node(
    host: Any, methods: Any, shown: dict[str, str]
) -> None:
    from comfy_execution.utils import CurrentNodeContext

    for rows, told in (
        ([True], "The first of two passes took 8 predictions."),
        ([False], ""),
    ):
        with CurrentNodeContext("prompt", "1"):
            two_pass = methods.attach(host.model, methods.TwoPass(rows))
        with CurrentNodeContext("prompt", "2"):
            both = methods.attach(two_pass, methods.Push())
        host.sample(both, host.text(STAR), steps=4)
        assert shown["1"].endswith(told or "changed nothing.") and "two passes" not in shown["2"]
