"""The sampling engine in the real host: identity, run state, extra predictions, guiders, masks, batches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from demo_prompts import HEART, STAR
from safe_guidance.guidance.core.composition import Change
from safe_guidance.guidance.core.noise_level import SigmaWindow

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

LAYOUT = 1e-4
"""Tolerance for batches of another size, which sum in another order, times a noise level of about 15."""


@pytest.fixture
def runs(host: Any) -> Any:
    """Return the module under test, and corrections made for the tests."""
    from safe_guidance.nodes.host.engine import hooks

    class Push(hooks.Correction):
        """Correction that adds `amount` to the samples in `rows` inside a window, and records its steps."""

        def __init__(
            self, amount: float = 0.0, rows: list[int] | None = None, window: SigmaWindow | None = None
        ) -> None:
            self.amount, self.rows, self.window = amount, rows, window or SigmaWindow()
            self.seen: list[Any] = []
            self.begun = 0

        def begin(self, context: Any) -> None:
            self.begun += 1

        def is_active(self, level: Any) -> bool:
            return level in self.window

        def correct(self, step: Any, state: None) -> Change | None:
            self.seen.append(step)
            if self.amount == 0:
                return None
            active = torch.zeros(len(step.denoised), dtype=torch.bool)
            active[self.rows if self.rows is not None else slice(None)] = True
            return Change(torch.full_like(step.denoised, self.amount), active, cap=1.0)

    class TowardsText(Push):
        """Correction that moves the prediction halfway to that of a text."""

        def __init__(self, conditioning: list[Any], window: SigmaWindow | None = None) -> None:
            super().__init__(1.0, window=window)
            self.texts = {"target": conditioning}

        def wanted_texts(self, step: Any, state: None) -> dict[str, torch.Tensor]:
            return {"target": step.every_row}

        def correct(self, step: Any, state: None) -> Change:
            self.seen.append(step)
            delta = 0.5 * (step.predictions["target"] - step.denoised)
            return Change(delta, torch.ones(len(delta), dtype=torch.bool), cap=1.0)

    class Asks(Push):
        """Correction that requests predictions of some rows, and records its steps."""

        def __init__(self, wanted: dict[str, list[bool]], texts: dict[str, list[Any]] | None = None) -> None:
            super().__init__()
            self.wanted, self.texts = wanted, texts or {}

        def wanted_texts(self, step: Any, state: None) -> dict[str, torch.Tensor]:
            return {name: torch.tensor(rows) for name, rows in self.wanted.items()}

    class Steers(Push):
        """Correction that replaces the positive conditioning of some rows by another text's at the
        first step.
        """

        def __init__(self, conditioning: list[Any], rows: list[bool]) -> None:
            super().__init__()
            self.texts, self.steered = {"target": conditioning}, torch.tensor(rows)

        def begin(self, context: Any) -> dict[str, bool]:
            return {"done": False}

        def steer(self, step: Any, state: dict[str, bool]) -> torch.Tensor | None:
            if state["done"]:
                return None
            state["done"] = True
            guider = step.guider
            guider.conds["positive"] = next(
                conds for key, conds in guider.conds.items() if key.startswith(hooks.KEY)
            )
            return self.steered

    return SimpleNamespace(
        attach=hooks.attach, module=hooks, Push=Push, TowardsText=TowardsText, Asks=Asks, Steers=Steers
    )


def test_inactive_corrections_change_no_bit_and_call_no_model(host: Any, runs: Any) -> None:
    text = host.text(STAR)
    plain, plain_rows = host.count_calls(host.model)
    baseline = host.sample(plain, text)
    never = SigmaWindow(high=1e-6, low=0)
    for correction in (
        runs.Push(0.0),
        runs.Push(1.0, window=never),
        runs.Push(1.0, rows=[]),
        runs.TowardsText(host.text(HEART), window=never),
    ):
        model, rows = host.count_calls(runs.attach(host.model, correction))
        assert torch.equal(host.sample(model, text), baseline)
        assert rows == plain_rows


def test_attaching_leaves_the_original_model_alone(host: Any, runs: Any) -> None:
    text = host.text(STAR)
    baseline = host.sample(host.model, text)
    pushed = host.sample(runs.attach(host.model, runs.Push(0.3)), text)
    assert not torch.equal(pushed, baseline)
    assert torch.equal(host.sample(host.model, text), baseline)


def test_corrections_add_up_in_any_order(host: Any, runs: Any) -> None:
    text = host.text(STAR)
    pushes = [runs.Push(0.01), runs.Push(0.02, rows=[0]), runs.Push(0.003)]

    def sampled(order: list[int]) -> torch.Tensor:
        model = host.model
        for index in order:
            model = runs.attach(model, pushes[index])
        return host.sample(model, text)

    first = sampled([0, 1, 2])
    assert all(torch.equal(sampled(order), first) for order in ([2, 1, 0], [1, 0, 2], [0, 2, 1]))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2s_ancestral", "dpmpp_sde", "euler_ancestral"])
def test_state_advances_once_per_noise_level(host: Any, runs: Any, sampler: str) -> None:
    probe = runs.Push(0.0)
    host.sample(runs.attach(host.model, probe), host.text(STAR), sampler=sampler, steps=4)
    new = [step.sigma for step in probe.seen if step.is_new]
    assert new == sorted(set(new), reverse=True)
    assert len(probe.seen) >= 4 and len(new) >= 4
    if sampler == "heun":
        # Three of the four steps evaluate the model a second time, at the noise level that the next step
        # starts from.
        assert len(probe.seen) == 7 and len(new) == 4


def test_every_run_starts_with_new_state(host: Any, runs: Any) -> None:
    probe = runs.Push(0.0)
    model = runs.attach(host.model, probe)
    host.sample(model, host.text(STAR), steps=2)
    host.sample(model, host.text(STAR), steps=2)
    assert probe.begun == 2
    assert [step.is_new for step in probe.seen] == [True] * 4


def test_a_resumed_run_gets_the_resume_data_of_the_previous_one(host: Any, runs: Any) -> None:
    class Counts(runs.Push):
        """Correction that counts its steps over all resumed runs."""

        def begin(self, context: Any) -> dict[str, int]:
            return {"steps": 0}

        def resume_data(self, state: dict[str, int]) -> int | None:
            return state["steps"] or None

        def resume(self, state: dict[str, int], data: int) -> None:
            state["steps"] = data

        def correct(self, step: Any, state: dict[str, int]) -> None:
            state["steps"] += 1
            self.last = state["steps"]

    from safe_guidance.nodes.host.engine import resume

    text, counts = host.text(STAR), Counts()
    model = runs.attach(runs.attach(host.model, runs.Push()), counts)
    for bounds, last in (((0, 6), 6), ((0, 2, 6), 6), ((0, 1, 2, 6), 6)):
        host.sample_in_parts(model, text, bounds)
        assert counts.last == last
    advanced = host.nodes.KSamplerAdvanced().sample

    def part(model: Any, latent: Any, noise: str, start: int, end: int, left: str = "enable") -> Any:
        inputs = (model, noise, 1, 6, 5.0, "euler", "karras", text, host.text(""), latent, start, end, left)
        return advanced(*inputs)[0]

    half = part(model, host.empty_latent(), "enable", 0, 3)
    # Another step, new noise, or other latents make a new run.
    for latent, noise, start in (
        (half, "disable", 4),
        (half, "enable", 3),
        ({"samples": 1.01 * half["samples"]}, "disable", 3),
    ):
        part(model, latent, noise, start, 6)
        assert counts.last == 6 - start
    # A node of its own in every part continues, and another method beside it changes nothing about that.
    part(runs.attach(runs.attach(host.model, runs.Push()), counts), half, "disable", 3, 6)
    assert counts.last == 6
    # The same part can be resumed again, also when something else was sampled in between.
    for _ in range(2):
        host.sample(model, host.text(HEART), steps=2)
        part(model, half, "disable", 3, 6)
        assert counts.last == 6
    # A finished image has nothing to resume: image-to-image from it is a new run.
    finished = part(model, host.empty_latent(), "enable", 0, 6, "disable")
    host.sample(model, text, finished, steps=4, denoise=0.5)
    assert counts.last == 4
    store = resume.store_of(model)
    for seed in range(12):
        point = resume.ResumePoint((counts,), (seed,), None)
        store.keep(torch.full((1, 4, 2, 2), float(seed)), torch.tensor([3.0, 1.0]), point)
    assert len(store._kept) == 8


def test_texts_of_all_corrections_take_one_batched_call(host: Any, runs: Any) -> None:
    text, target = host.text(STAR), host.text(HEART)
    model = runs.attach(host.model, runs.TowardsText(target))
    model = runs.attach(model, runs.TowardsText(host.text(HEART)))
    model = runs.attach(model, runs.TowardsText(host.text("a blue cross at the top, flat style")))
    counted, rows = host.count_calls(model)
    host.sample(counted, text, steps=3, sampler="euler")
    # Each step: positive and negative together, then the two different texts together; the repeated text
    # costs nothing.
    assert rows == [2, 2] * 3


def test_extra_predictions_are_the_models_own(host: Any, runs: Any) -> None:
    """With CFG 1 and the target as prompt, the text's prediction equals the denoised prediction."""
    correction = runs.TowardsText(host.text(HEART))
    host.sample(runs.attach(host.model, correction), host.text(HEART), cfg=1.0, steps=3)
    for step in correction.seen:
        # One evaluates a batch of one, the other too: the same kernels, so the same bits up to batching
        # order.
        torch.testing.assert_close(step.predictions["target"], step.denoised, atol=1e-5, rtol=1e-5)


def guiders(host: Any, model: Any) -> dict[str, Any]:
    from comfy.samplers import CFGGuider
    from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG, Guider_DualModel
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    star, heart, empty = host.text(STAR), host.text(HEART), host.text("")
    cfg = CFGGuider(model)
    cfg.set_conds(star, empty)
    cfg.set_cfg(5.0)
    basic = Guider_Basic(model)
    basic.set_conds(star)
    dual = Guider_DualCFG(model)
    dual.set_conds(star, heart, empty)
    dual.set_cfg(3.0, 3.0)
    perpendicular = Guider_PerpNeg(model)
    perpendicular.set_conds(star, heart, empty)
    perpendicular.set_cfg(5.0, 1.0)
    pair = Guider_DualModel(model, model)
    pair.set_conds(star, empty)
    pair.set_cfg(5.0)
    return {"cfg": cfg, "basic": basic, "dual": dual, "perpendicular": perpendicular, "pair": pair}


@pytest.mark.parametrize("name", ["cfg", "basic", "dual", "perpendicular", "pair"])
def test_every_guider_gives_the_corrected_prediction(host: Any, runs: Any, name: str) -> None:
    import comfy.samplers

    probe = runs.Push(0.25)
    sigmas = comfy.samplers.calculate_sigmas(host.model.get_model_object("model_sampling"), "normal", 4)
    latent = torch.zeros(1, 4, 32, 32)
    noise = comfy.sample.prepare_noise(latent, 3)

    def sampled(model: Any) -> torch.Tensor:
        guider = guiders(host, model)[name]
        return guider.sample(
            noise, latent, comfy.samplers.sampler_object("euler"), sigmas, seed=3, disable_pbar=True
        )

    corrected, plain = sampled(runs.attach(host.model, probe)), sampled(host.model)
    assert len(probe.seen) == 4
    # Euler's last step returns the corrected prediction itself.
    expected = host.model.model.process_latent_out(probe.seen[-1].denoised + 0.25)
    torch.testing.assert_close(corrected, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(corrected, plain)


def test_only_the_active_sample_of_a_batch_changes(host: Any, runs: Any) -> None:
    text = host.text(STAR, HEART, STAR, HEART)
    baseline = host.sample(host.model, text)
    pushed = host.sample(runs.attach(host.model, runs.Push(0.3, rows=[2])), text)
    assert [torch.equal(pushed[i], baseline[i]) for i in range(4)] == [True, True, False, True]


def test_inpainting_keeps_what_is_masked(host: Any, runs: Any) -> None:
    text = host.text(STAR)
    original = host.sample(host.model, host.text(HEART), seed=4)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    latent = {"samples": original, "noise_mask": mask}
    changed = host.sample(runs.attach(host.model, runs.Push(0.3)), text, latent)
    assert not torch.equal(changed, host.sample(host.model, text, latent))
    torch.testing.assert_close(changed[..., 16:], original[..., 16:], atol=1e-5, rtol=1e-5)


def test_interrupt_leaves_nothing_behind(host: Any, runs: Any) -> None:
    import comfy.model_management

    text = host.text(STAR)
    probe = runs.Push(0.1)
    model = runs.attach(host.model, probe)
    expected = host.sample(model, text)
    plain = host.sample(host.model, text)

    class Interrupting(runs.Push):
        def correct(self, step: Any, state: None) -> None:
            comfy.model_management.interrupt_current_processing(True)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        host.sample(runs.attach(model, Interrupting()), text)
    comfy.model_management.interrupt_current_processing(False)
    assert torch.equal(host.sample(model, text), expected)
    assert torch.equal(host.sample(host.model, text), plain)


def test_noise_levels_of_all_kinds_of_models(host: Any, runs: Any) -> None:
    import comfy.model_sampling

    from safe_guidance.nodes.host.engine.schedule import noise_level

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    class Velocity(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    level = noise_level(host.model.get_model_object("model_sampling"), torch.tensor([4.67, 4.67]))
    assert (level.signal, level.sigma) == (1.0, pytest.approx(4.67))
    level = noise_level(Velocity(), torch.tensor([2.5]))
    assert (level.signal, level.sigma) == (1.0, pytest.approx(2.5))
    level = noise_level(Flow(), torch.tensor([0.78]))
    assert (level.signal, level.noise) == (pytest.approx(0.22), pytest.approx(0.78))
    assert noise_level(Flow(), torch.tensor([1.0])).sigma == math.inf


def test_branches_of_the_guider_make_its_prediction(host: Any, runs: Any) -> None:
    probe = runs.Push()
    host.sample(runs.attach(host.model, probe), host.text(STAR), cfg=3.0, steps=3)
    for step in probe.seen:
        cond, uncond = step.predictions["positive"], step.predictions["negative"]
        assert step.cond_scale == 3.0
        torch.testing.assert_close(uncond + 3.0 * (cond - uncond), step.denoised, atol=LAYOUT, rtol=0)


def test_a_branch_that_cfg_1_skips_is_evaluated_on_request(host: Any, runs: Any) -> None:
    text, asks = host.text(STAR), runs.Asks({"negative": [True]})
    counted, rows = host.count_calls(runs.attach(host.model, asks))
    host.sample(counted, text, cfg=1.0, steps=3, sampler="euler")
    assert rows == [1, 1] * 3
    probe = runs.Push()
    host.sample(runs.attach(host.model, probe), text, cfg=2.0, steps=1, sampler="euler")
    torch.testing.assert_close(
        asks.seen[0].predictions["negative"], probe.seen[0].predictions["negative"], atol=LAYOUT, rtol=0
    )
    counted, rows = host.count_calls(runs.attach(host.model, asks))
    host.sample(counted, text, cfg=2.0, steps=3, sampler="euler")
    assert rows == [2] * 3


def test_texts_are_predicted_for_the_rows_that_need_them(host: Any, runs: Any) -> None:
    text, texts = host.text(STAR, HEART, STAR), {"target": host.text(HEART)}
    all_rows, some_rows = (runs.Asks({"target": rows}, texts) for rows in ([True] * 3, [False, True, False]))
    for asks, expected in (
        (all_rows, [6, 3]),
        (some_rows, [6, 1]),
        (runs.Asks({"target": [False] * 3}, texts), [6]),
    ):
        counted, rows = host.count_calls(runs.attach(host.model, asks))
        host.sample(counted, text, steps=1, sampler="euler")
        assert rows == expected
    whole, part, denoised = (
        all_rows.seen[0].predictions["target"],
        some_rows.seen[0].predictions["target"],
        some_rows.seen[0].denoised,
    )
    torch.testing.assert_close(part[1], whole[1], atol=LAYOUT, rtol=0)
    assert torch.equal(part[[0, 2]], denoised[[0, 2]])


def test_a_text_that_differs_between_rows_is_predicted_for_all(host: Any, runs: Any) -> None:
    text, target = host.text(STAR, HEART), host.text(HEART, STAR)
    asks = runs.Asks({"target": [False, True]}, {"target": target})
    counted, rows = host.count_calls(runs.attach(host.model, asks))
    host.sample(counted, text, steps=1, sampler="euler")
    assert rows == [4, 2]
    assert torch.equal(asks.seen[0].predictions["target"][0], asks.seen[0].denoised[0])


def test_steered_rows_are_predicted_again_and_the_rest_keeps_its_bits(host: Any, runs: Any) -> None:
    text, other = host.text(STAR, STAR), host.text(HEART)
    both = {"samples": torch.zeros(2, 4, 32, 32), "batch_index": [0, 1]}
    baseline, heart = (
        host.sample(host.model, t, both, steps=1, sampler="euler") for t in (text, host.text(HEART, HEART))
    )
    counted, rows = host.count_calls(runs.attach(host.model, runs.Steers(other, [False, True])))
    steered = host.sample(counted, text, both, steps=1, sampler="euler")
    assert rows == [4, 4]
    assert torch.equal(steered[0], baseline[0])
    torch.testing.assert_close(steered[1], heart[1], atol=LAYOUT, rtol=0)
    # The run's conditioning is its own: the next run starts from the prompt again.
    assert torch.equal(host.sample(host.model, text, both, steps=1, sampler="euler"), baseline)


def test_un_sampling_stays_within_the_noise(host: Any, runs: Any, shown: dict[str, str]) -> None:
    """A change as large as the image, from no noise up: its multiple of the noise level must not explode."""
    import comfy.samplers
    from comfy_execution.utils import CurrentNodeContext
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    sigmas = torch.tensor([1e-4, 0.1, 1.0, 5.0])

    def sampled(model: Any) -> torch.Tensor:
        guider = Guider_Basic(model)
        guider.set_conds(host.text(STAR))
        sampler = comfy.samplers.sampler_object("euler")
        still = torch.zeros(1, 4, 32, 32)
        latent = torch.randn(still.shape, generator=torch.Generator().manual_seed(0))
        return guider.sample(still, latent, sampler, sigmas, seed=0, disable_pbar=True)

    with CurrentNodeContext("prompt", "7"):
        pushed = runs.attach(host.model, runs.Push(1.0))
    scale = host.model.model.latent_format.scale_factor
    assert (sampled(pushed) - sampled(host.model)).abs().max() * scale <= 3 * 5.0
    assert "un-sampling" in shown["7"]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_second_visit_of_a_noise_level_is_a_new_time(host: Any, runs: Any, sampler: str) -> None:
    import comfy.samplers

    probe = runs.Push(0.0)
    guider = comfy.samplers.CFGGuider(runs.attach(host.model, probe))
    guider.set_conds(host.text(STAR), host.text(""))
    levels = [8.0, 2.0, 0.5, 2.0, 0.5, 0.0]
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    guider.sample(
        noise,
        torch.zeros_like(noise),
        comfy.samplers.sampler_object(sampler),
        torch.tensor(levels),
        seed=0,
        disable_pbar=True,
    )
    assert [step.sigma for step in probe.seen if step.is_new] == levels[:-1]
