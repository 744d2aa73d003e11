"""A run sampled once before: what it keeps, what it costs, what is shown of it, and whom it touches."""

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
        """Makes every prediction larger."""

        name = "Push"

        def __init__(self, amount: float = 0.2) -> None:
            self.amount = amount

        def is_active(self, level: Any) -> bool:
            return True

        def correct(self, step: Any, state: Any) -> Change:
            return Change(self.amount * step.denoised, step.every_row)

    class LooksFirst(Push):
        """The same, in some rows, after a rehearsal; everywhere, though it says that it acts on the left."""

        name = "Looks first"
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
        """Replaces the positive conditioning at the first step."""

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
        attach=hooks.attach, trace=hooks.trace_of, Push=Push, LooksFirst=LooksFirst, Steers=Steers
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
    changed = host.sample(
        methods.attach(host.model, methods.LooksFirst([True, False])), text, sampler=sampler
    )
    assert torch.equal(changed[1], plain[1])
    assert same_outside(changed, plain) and not torch.equal(changed[0], plain[0])


def test_without_a_rehearsal_it_would_not(host: Any, methods: Any) -> None:
    """The model sees the whole image, so what is changed on the left has effects on the right."""
    text = host.text(STAR)

    class OnTheLeft(methods.Push):
        def correct(self, step: Any, state: Any) -> Change:
            return Change(self.amount * step.denoised * LEFT, step.every_row)

    plain = host.sample(host.model, text)
    assert not same_outside(host.sample(methods.attach(host.model, OnTheLeft()), text), plain)


def test_nothing_to_do_costs_nothing_and_changes_no_bit(host: Any, methods: Any) -> None:
    text = host.text(STAR, HEART)
    plain, plain_rows = host.count_calls(host.model)
    baseline = host.sample(plain, text)
    model, rows = host.count_calls(methods.attach(host.model, methods.LooksFirst([False, False])))
    assert torch.equal(host.sample(model, text), baseline)
    assert rows == plain_rows
    assert methods.trace(model, baseline).rehearsal == 0


def test_a_rehearsal_watches_where_the_method_may_act_and_is_counted(host: Any, methods: Any) -> None:
    method = methods.LooksFirst([True], SigmaWindow(high=5.0, low=1.0))
    model, rows = host.count_calls(methods.attach(host.model, method))
    samples = host.sample(model, host.text(STAR), steps=10)
    trace = methods.trace(model, samples)
    assert method.begun == 1
    assert method.steps == [sigma for sigma in trace.sigmas if 1 <= sigma <= 5] and len(trace.sigmas) == 10
    assert trace.rehearsal == 20 and trace.rehearsal + trace.forwards == sum(rows)
    assert [record.call for record in trace.records] == [
        i for i, sigma in enumerate(trace.sigmas) if 1 <= sigma <= 5
    ]


def test_what_other_methods_do_is_rehearsed_too(host: Any, methods: Any) -> None:
    text = host.text(STAR)
    pushed = methods.attach(host.model, methods.Push(0.05))
    alone, both = (
        host.sample(model, text) for model in (pushed, methods.attach(pushed, methods.LooksFirst([True])))
    )
    assert same_outside(alone, both) and not torch.equal(alone, both)


def test_a_conditioning_that_a_method_replaced_is_there_again_in_the_run(host: Any, methods: Any) -> None:
    text = host.text(STAR)
    steered = methods.attach(host.model, methods.Steers(host.text(HEART)))
    alone, both = (
        host.sample(model, text) for model in (steered, methods.attach(steered, methods.LooksFirst([True])))
    )
    assert same_outside(alone, both) and not torch.equal(alone, both)


def test_several_methods_may_change_what_any_of_them_may(host: Any, methods: Any) -> None:
    text = host.text(STAR, HEART)
    model = methods.attach(
        methods.attach(host.model, methods.LooksFirst([True, False])), methods.LooksFirst([False, True])
    )
    plain, changed = host.sample(host.model, text), host.sample(model, text)
    assert same_outside(plain, changed)
    assert [torch.equal(a, b) for a, b in zip(plain, changed)] == [False, False]


def test_inpainting_keeps_its_mask(host: Any, methods: Any) -> None:
    text = host.text(STAR)
    latent = {"samples": host.sample(host.model, host.text(HEART)), "noise_mask": torch.zeros(1, 1, 128, 128)}
    latent["noise_mask"][..., 64:, :] = 1.0
    plain = host.sample(host.model, text, latent)
    changed = host.sample(methods.attach(host.model, methods.LooksFirst([True])), text, latent)
    assert same_outside(plain, changed) and not torch.equal(plain, changed)
    assert torch.equal(plain[..., :16, :], changed[..., :16, :])


def guided(
    host: Any, model: Any, seed: int | None, callback: Any = None, sampler: str = "euler_ancestral"
) -> torch.Tensor:
    """A run with a guider of its own, as custom samplers make it."""
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


def test_a_sampler_without_a_seed_draws_the_same_again(host: Any, methods: Any) -> None:
    def sampled(model: Any) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return guided(host, model, seed=None)

    assert same_outside(sampled(methods.attach(host.model, methods.LooksFirst([True]))), sampled(host.model))


@pytest.mark.parametrize(("rows", "steps_shown"), [([True], [0, 1, 2, 3]), ([False], [3])])
def test_a_rehearsal_is_never_previewed(
    host: Any, methods: Any, rows: list[bool], steps_shown: list[int]
) -> None:
    """It would show what is being avoided. When it is the run, its last step is what the host takes the result from."""
    seen: list[tuple[int, torch.Tensor]] = []
    model = methods.attach(host.model, methods.LooksFirst(rows))
    samples = guided(host, model, 1, lambda step, x0, x, steps: seen.append((step, x0)))
    assert [step for step, _ in seen] == steps_shown
    assert torch.equal(host.model.model.process_latent_out(seen[-1][1]), samples)


def test_a_sampler_that_chooses_its_steps_runs_on_and_says_so(
    host: Any, methods: Any, caplog: pytest.LogCaptureFixture
) -> None:
    samples = guided(host, methods.attach(host.model, methods.LooksFirst([True])), 1, sampler="dpm_adaptive")
    assert bool(samples.isfinite().all())
    assert caplog.text.count("chooses its own steps") == 1


def test_the_parts_of_an_image_keep_what_one_run_keeps(host: Any, methods: Any) -> None:
    """The rehearsal goes on where that of the part before stopped, and so does the run, also when a part has nothing to do."""
    text = host.text(STAR, HEART)
    plain = host.sample_in_parts(host.model, text, (0, 3, 6))
    model = methods.attach(host.model, methods.LooksFirst([True, False]))
    assert same_outside(host.sample_in_parts(model, text, (0, 3, 6)), plain)
    early = methods.LooksFirst([True, False])
    early.end_first_pass = lambda state: (
        methods.LooksFirst.end_first_pass(early, state)
        if len(state.sigmas) == 3 and state.sigmas[0] > 10
        else None
    )
    early.correct = lambda step, state: (
        methods.LooksFirst.correct(early, step, state) if state.sigmas[0] > 10 else None
    )
    changed = host.sample_in_parts(methods.attach(host.model, early), text, (0, 3, 6))
    assert same_outside(changed, plain)
    assert [torch.equal(a, b) for a, b in zip(changed, plain)] == [False, True]


def test_what_a_rehearsal_cost_stands_under_the_node_that_asked_for_it(
    host: Any, methods: Any, shown: dict[str, str]
) -> None:
    from comfy_execution.utils import CurrentNodeContext

    for rows, told in (
        ([True], "The run was rehearsed with 8 predictions, to see what there is to keep."),
        ([False], ""),
    ):
        with CurrentNodeContext("prompt", "1"):
            looks = methods.attach(host.model, methods.LooksFirst(rows))
        with CurrentNodeContext("prompt", "2"):
            both = methods.attach(looks, methods.Push())
        host.sample(both, host.text(STAR), steps=4)
        assert shown["1"].endswith(told or "changed nothing.") and "rehearsed" not in shown["2"]
