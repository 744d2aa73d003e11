"""STG and SDG in the real host: cost, which samples they change, and no effect after the run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from demo_prompts import HEART, STAR
from safe_guidance.guidance.core.noise_level import SigmaWindow
from safe_guidance.guidance.safe_data_guidance import SafeDataGuidanceSettings
from safe_guidance.guidance.safe_text_guidance import SafeTextGuidanceSettings
from safe_guidance.guidance.safety_functions.interface import Assessment, SafetyFunction

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

CROSS = "a white cross at the bottom on a teal checkered background, outline style"
EVERY_STEP = SigmaWindow()


class Brightness(SafetyFunction):
    """Safety function whose score is the brightness of all images, or of those in `rows` of the batch."""

    name = "brightness"

    def __init__(
        self, rows: list[bool] | None = None, score: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.rows = rows
        self.seen: list[Tensor] = []
        self.score = score or (lambda images: images.mean((1, 2, 3)))

    def __call__(self, images: Tensor) -> Assessment:
        self.seen.append(images.detach().clone())
        gate = torch.ones(len(images), dtype=torch.bool)
        if self.rows is not None and len(images) == len(self.rows):
            gate = torch.tensor(self.rows)
        return Assessment(self.score(images), gate, [{} for _ in images])


@pytest.fixture
def stg(host: Any) -> Callable[..., Any]:
    """Attach STG to the demo model or to another."""
    from safe_guidance.nodes.host.engine.hooks import attach
    from safe_guidance.nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

    def protect(
        function: SafetyFunction, model: Any = None, vae: Any = None, decoder: Any = "vae", **settings: Any
    ) -> Any:
        chosen = SafeTextGuidanceSettings(**{"rho": 0.02, "tau": -1e9, "window": EVERY_STEP, **settings})
        return attach(
            model or host.model, SafeTextGuidanceCorrection(vae or host.vae, function, chosen, decoder)
        )

    return protect


@pytest.fixture
def sdg(host: Any) -> Callable[..., Any]:
    from safe_guidance.nodes.host.engine.hooks import attach
    from safe_guidance.nodes.host.methods.safe_data_guidance import SafeDataGuidanceCorrection

    def protect(function: SafetyFunction, model: Any = None, vae: Any = None, **settings: Any) -> Any:
        chosen = SafeDataGuidanceSettings(**{"tau": -1e9, "window": EVERY_STEP, **settings})
        return attach(model or host.model, SafeDataGuidanceCorrection(vae or host.vae, function, chosen))

    return protect


@pytest.fixture(params=["stg", "sdg"])
def either(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def test_a_detector_that_never_fires_changes_no_bit_and_costs_no_model_call(host: Any, either: Any) -> None:
    plain, plain_rows = host.count_calls(host.model)
    baseline = host.sample(plain, host.text(STAR), steps=3)
    model, rows = host.count_calls(either(Brightness(rows=[False])))
    assert torch.equal(host.sample(model, host.text(STAR), steps=3), baseline)
    assert rows == plain_rows


def test_stg_5_a_closed_gate_makes_no_graph_and_an_open_one_only_for_its_row(
    host: Any, stg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safe_guidance.nodes.host.methods import detector_correction, safe_text_guidance

    graphs: list[int] = []
    for module, name in (
        (detector_correction, "prediction_gradient"),
        (safe_text_guidance, "text_gradients"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, original=original: (graphs.append(1), original(*args))[1]
        )
    text = host.text(STAR, HEART, CROSS)
    before = text[0][0].clone()
    counted, rows = host.count_calls(stg(Brightness(rows=[False, False, False])))
    host.sample(counted, text, steps=2)
    assert graphs == [] and rows == [6, 6]
    rows.clear()
    counted, rows = host.count_calls(stg(Brightness(rows=[False, True, False])))
    host.sample(counted, text, steps=2)
    # All are assessed, one is differentiated, and the batch is evaluated again.
    # Samples that did not move keep the first prediction.
    assert graphs == [1, 1] * 2 and rows == [6, 1, 6] * 2
    # The embedding that moved is the run's own; the workflow's conditioning is as it was.
    assert torch.equal(text[0][0], before)


def test_no_strength_and_no_step_in_the_window_are_the_identity(host: Any, stg: Any, sdg: Any) -> None:
    baseline = host.sample(host.model, host.text(STAR), steps=3)
    never = SigmaWindow(high=1e-6, low=0)
    looked = Brightness()
    off = (
        stg(looked, rho=0.0),
        stg(looked, gamma=0.0),
        stg(looked, window=never),
        sdg(looked, strength=0.0),
        sdg(looked, window=never),
    )
    for model in off:
        counted, rows = host.count_calls(model)
        assert torch.equal(host.sample(counted, host.text(STAR), steps=3), baseline)
        assert rows == [2, 2, 2]
    assert not looked.seen


def test_a_detector_that_always_fires_costs_a_gradient_and_another_prediction(
    host: Any, stg: Any, sdg: Any
) -> None:
    baseline = host.sample(host.model, host.text(STAR), steps=3)
    for model, calls in (
        (stg(Brightness()), [2, 1, 2]),
        (sdg(Brightness()), [2, 2]),
        (sdg(Brightness(), cheap=True), [2]),
    ):
        counted, rows = host.count_calls(model)
        assert not torch.equal(host.sample(counted, host.text(STAR), steps=3), baseline)
        assert rows == calls * 3


def test_gamma_spares_steps(host: Any, stg: Any) -> None:
    counted, rows = host.count_calls(stg(Brightness(), gamma=0.5))
    host.sample(counted, host.text(STAR), steps=4)
    assert rows == [2, 1, 2, 2, 2, 1, 2, 2]


class SeenEmbeddings:
    """Records the text embedding of the first sample at every evaluation of a model's positive branch."""

    def __init__(self, model: Any) -> None:
        from comfy.patcher_extension import WrappersMP

        self.seen: list[Tensor] = []
        self.model = model.clone()
        self.model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "seen", self._record)

    def _record(self, executor: Any, model: Any, conds: list[Any], *args: Any) -> Any:
        self.seen.append(conds[0][0]["model_conds"]["c_crossattn"].cond[:1].float().clone())
        return executor(model, conds, *args)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_without_accumulation_every_evaluation_starts_from_the_prompts_own_embedding(
    host: Any, stg: Any, sampler: str
) -> None:
    """The paper's formula: the first prediction of an evaluation and its gradient are those of the prompt."""
    text = host.text(STAR)
    watched = SeenEmbeddings(stg(Brightness(), accumulate=False))
    host.sample(watched.model, text, steps=3, sampler=sampler)
    evaluations = 3 if sampler == "euler" else 5
    # An evaluation predicts, takes a gradient and predicts again.
    assert len(watched.seen) == 3 * evaluations
    prompt = text[0][0].float()
    for first, gradient, again in zip(*(watched.seen[i::3] for i in range(3))):
        assert torch.equal(first, prompt) and torch.equal(gradient, prompt)
        distance = (again - prompt).norm() / prompt.norm()
        assert distance.item() == pytest.approx(0.02, rel=1e-3), "one move of rho, not the sum of several"


def test_with_accumulation_moves_add_up_within_trust_of_the_prompt(host: Any, stg: Any) -> None:
    text = host.text(STAR)
    watched = SeenEmbeddings(stg(Brightness(), rho=0.05, trust=0.06))
    host.sample(watched.model, text, steps=3)
    prompt = text[0][0].float()
    distances = [((seen - prompt).norm() / prompt.norm()).item() for seen in watched.seen]
    assert distances == pytest.approx([0, 0, 0.05, 0.05, 0.05, 0.06, 0.06, 0.06, 0.06], abs=2e-4)


def test_a_move_that_is_undone_leaves_another_nodes_accumulated_move(host: Any, stg: Any) -> None:
    text = host.text(STAR)
    prompt = text[0][0].float()
    for first, second in ((False, True), (True, False), (False, False)):
        model = stg(Brightness(), model=stg(Brightness(), accumulate=first), accumulate=second)
        watched = SeenEmbeddings(model)
        host.sample(watched.model, text, steps=2)
        # Five evaluations a step: the prediction, and a gradient and another prediction for each node.
        begin = watched.seen[5]
        if first or second:
            assert ((begin - prompt).norm() / prompt.norm()).item() == pytest.approx(0.02, rel=1e-2)
        else:
            assert torch.equal(begin, prompt)


def test_guidance_decreases_the_score(host: Any, either: Any) -> None:
    def brightness(model: Any) -> float:
        return float(host.vae.decode(host.sample(model, host.text(STAR, HEART), steps=6)).mean())

    settings = (
        {"strength": 0.03}
        if "strength" in SafeDataGuidanceSettings.__dataclass_fields__
        and either.__qualname__.startswith("sdg")
        else {}
    )
    assert brightness(either(Brightness(), **settings)) < brightness(host.model) - 0.01


def test_only_the_images_objected_to_change(host: Any, either: Any) -> None:
    text = host.text(STAR, HEART, CROSS)
    baseline = host.sample(host.model, text, steps=4)
    guided = host.sample(either(Brightness(rows=[False, True, False])), text, steps=4)
    assert [torch.equal(a, b) for a, b in zip(guided, baseline)] == [True, False, True]


def test_an_image_in_a_batch_is_guided_as_it_is_alone(host: Any, stg: Any) -> None:
    """Equal up to rounding, which depends on the batch size."""
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    together = sample_noise(host, stg(Brightness()), host.text(STAR, HEART), noise)
    alone = sample_noise(host, stg(Brightness()), host.text(HEART), noise[1:])
    torch.testing.assert_close(together[1:], alone, atol=2e-2, rtol=1e-2)


def sample_noise(host: Any, model: Any, positive: list[Any], noise: Tensor) -> Tensor:
    import comfy.sample

    negative = host.text(*[""] * len(noise))
    return comfy.sample.sample(
        model, noise, 4, 5.0, "euler", "karras", positive, negative, torch.zeros_like(noise), seed=1
    )


@pytest.mark.parametrize(
    "score",
    [
        lambda images: 0 * images.mean((1, 2, 3)),
        lambda images: images.mean((1, 2, 3)) * torch.nan,
        lambda images: torch.ones(len(images)),
        lambda images: images.clamp(5, 6).mean((1, 2, 3)),
    ],
    ids=["zero", "nan", "no gradient", "saturated"],
)
def test_an_unusable_gradient_changes_no_bit(
    host: Any, either: Any, score: Callable[[Tensor], Tensor]
) -> None:
    baseline = host.sample(host.model, host.text(STAR), steps=2)
    function = Brightness(score=score)
    assert torch.equal(host.sample(either(function), host.text(STAR), steps=2), baseline)
    assert function.seen


def test_stg_7_the_whole_chain_by_finite_differences(host: Any, stg: Any, tiny: ModuleType) -> None:
    """The chain goes from the classifier's score through decoder, CFG and network to the embedding."""
    from safe_guidance.nodes.host.autograd import conditioning_entries
    from safe_guidance.nodes.host.engine import hooks
    from safe_guidance.nodes.host.methods.safe_text_guidance import SafeTextGuidanceCorrection

    function = Brightness(score=lambda images: torch.sin(3 * images).mean((1, 2, 3)))
    correction = SafeTextGuidanceCorrection(host.vae, function, SafeTextGuidanceSettings())
    found: list[tuple[float, float]] = []

    class Compare(hooks.Correction):
        def patch(self, model: Any) -> Any:
            return correction.patch(model)

        def begin(self, context: Any) -> Any:
            return correction.begin(context)

        def is_active(self, level: Any) -> bool:
            return level.sigma < 3 and not found

        def correct(self, step: Any, state: Any) -> None:
            return None

        def steer(self, step: Any, state: Any) -> None:
            current = conditioning_entries.embeddings(step)
            verdict = correction.assess(step, state)
            (gradient,) = correction._gradients(step, state, verdict, current, torch.tensor([0]), False)
            direction = gradient / gradient.norm()

            def slope(width: float) -> float:
                scores = []
                for sign in (1, -1):
                    conditioning_entries.set_embeddings(step, [current[0] + sign * width * direction])
                    denoised = step.guider.predict_noise(step.x, step.timestep, step.model_options, None)
                    scores.append(float(function(state.decoder(denoised)).score.double()))
                return (scores[0] - scores[1]) / (2 * width)

            # Richardson: what is left of the curvature is of fourth order, so that the width can stand above
            # rounding.
            found.append((float(gradient.norm()), (4 * slope(0.2) - slope(0.4)) / 3))
            conditioning_entries.set_embeddings(step, current)

    host.sample(hooks.attach(host.model, Compare()), host.text(STAR), steps=5, sampler="euler")
    norm, difference = found[0]
    assert norm > 1e-5
    assert difference == pytest.approx(norm, rel=1e-3)


def test_without_negative_prompt(host: Any, either: Any) -> None:
    counted, rows = host.count_calls(either(Brightness()))
    guided = host.sample(counted, host.text(STAR), steps=2, cfg=1.0)
    assert not torch.equal(guided, host.sample(host.model, host.text(STAR), steps=2, cfg=1.0))
    assert set(rows) == {1}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_every_family(host: Any, either: Any, tiny: ModuleType, family: str) -> None:
    model = tiny.tiny_model(family)
    channels = tiny.latent_channels(model)
    guided = either(Brightness(), model, tiny.tiny_vae(channels))
    latent = {"samples": torch.zeros(1, channels, 8, 8)}

    def sampled(chosen: Any) -> Tensor:
        args = (
            1,
            2,
            1.0 if family == "flux" else 3.0,
            "euler",
            "normal",
            tiny.tiny_conditioning(0),
            tiny.tiny_conditioning(9),
            latent,
        )
        return host.nodes.common_ksampler(chosen, *args)[0]["samples"]

    result = sampled(guided)
    assert torch.isfinite(result).all() and not torch.equal(result, sampled(model))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde", "euler_ancestral", "euler_cfg_pp"])
def test_samplers_that_call_the_model_more_often(host: Any, either: Any, sampler: str) -> None:
    function = Brightness()
    result = host.sample(either(function), host.text(STAR), steps=3, sampler=sampler)
    assert torch.isfinite(result).all()
    if either.__qualname__.startswith("stg"):
        # Once without and once with a graph, for every noise level and no more.
        assert len(function.seen) <= 2 * 6


def test_what_inpainting_keeps_neither_triggers_nor_pulls(host: Any, either: Any) -> None:
    original = host.sample(host.model, host.text(HEART), seed=4)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    latent = {"samples": original, "noise_mask": mask}
    kept = Brightness(score=lambda images: images[..., 96:].mean((1, 2, 3)))
    guided = host.sample(either(kept), host.text(STAR), dict(latent), steps=4)
    shown = torch.stack([image[0, :, :, 96:] for image in kept.seen])
    # The detector sees the original image there, at every step.
    torch.testing.assert_close(shown, shown[:1].expand_as(shown), atol=0.05, rtol=0)
    torch.testing.assert_close(guided[..., 16:], original[..., 16:], atol=1e-5, rtol=1e-5)
    painted = Brightness(score=lambda images: images[..., :64].mean((1, 2, 3)))
    assert not torch.equal(host.sample(either(painted), host.text(STAR), dict(latent), steps=4), guided)


def test_interrupting_in_the_gradient_pass_leaves_nothing_behind(host: Any, stg: Any) -> None:
    import comfy.model_management

    text, function = host.text(STAR), Brightness()
    model = stg(function)
    expected, plain = host.sample(model, text, steps=2), host.sample(host.model, text, steps=2)

    def interrupting(images: Tensor) -> Tensor:
        if images.requires_grad:
            comfy.model_management.interrupt_current_processing(True)
        return images.mean((1, 2, 3))

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        host.sample(stg(Brightness(score=interrupting)), text, steps=2)
    assert not comfy.model_management.in_training
    assert torch.equal(host.sample(model, text, steps=2), expected)
    assert torch.equal(host.sample(host.model, text, steps=2), plain)


def test_short_memory_goes_image_by_image(host: Any, either: Any) -> None:
    """The host raises its out-of-memory error in the middle of a run."""
    failed: list[int] = []

    def hungry(images: Tensor) -> Tensor:
        if images.requires_grad and len(images) > 1:
            failed.append(len(images))
            raise torch.cuda.OutOfMemoryError("out of memory")
        return images.mean((1, 2, 3))

    text = host.text(STAR, HEART)
    expected = host.sample(either(Brightness()), text, steps=2, sampler="euler")
    found = host.sample(either(Brightness(score=hungry)), text, steps=2, sampler="euler")
    assert failed == [2, 2]
    plain = host.sample(host.model, text, steps=2, sampler="euler")
    # Batching and checkpoints change the rounding.
    assert (found - expected).abs().mean() < 0.01 * (plain - expected).abs().mean()


def test_img2img_is_guided_from_where_it_starts(host: Any, either: Any) -> None:
    latent = {"samples": host.sample(host.model, host.text(HEART), seed=4)}
    function = Brightness()
    plain, guided = (
        host.sample(m, host.text(STAR), dict(latent), steps=4, denoise=0.5)
        for m in (host.model, either(function))
    )
    looks = [images for images in function.seen if not images.requires_grad]
    assert host.vae.decode(guided).mean() < host.vae.decode(plain).mean()
    # The first look is at something like the heart that it starts from, not at what pure noise would give.
    fresh = Brightness()
    host.sample(either(fresh), host.text(STAR), steps=4)
    heart = host.vae.decode(latent["samples"]).movedim(-1, 1)
    assert (looks[0] - heart).abs().mean() < (fresh.seen[0] - heart).abs().mean() / 2


def test_areas_and_timestep_ranges_are_guided_too(host: Any, stg: Any) -> None:
    from nodes import ConditioningCombine, ConditioningSetArea, ConditioningSetTimestepRange

    left = ConditioningSetArea().append(host.text(STAR), 64, 128, 0, 0, 1.0)[0]
    late = ConditioningSetTimestepRange().set_range(host.text(CROSS), 0.5, 1.0)[0]
    positive = ConditioningCombine().combine(ConditioningCombine().combine(left, late)[0], host.text(HEART))[
        0
    ]
    before = [entry[0].clone() for entry in positive]
    guided, plain = (
        host.vae.decode(host.sample(m, positive, steps=4)) for m in (stg(Brightness()), host.model)
    )
    assert guided.mean() < plain.mean() - 0.005
    assert all(torch.equal(a, entry[0]) for a, entry in zip(before, positive))


def test_several_detectors_and_views_guide_a_run(host: Any, stg: Any) -> None:
    """A detector without a finding changes nothing; views of a function with an open gate guide as it
    does.
    """
    from safe_guidance.guidance.safety_functions.interface import CombinedSafetyFunction
    from safe_guidance.guidance.safety_functions.multi_view import Views

    def light(images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3)).exp()  # decoded predictions can be darker than black

    silent = Brightness(rows=[False], score=lambda images: 0 * images.mean((1, 2, 3)) - 100)
    alone = host.sample(stg(Brightness(score=light)), host.text(STAR), steps=2)
    for combination in ("sum", "maximum"):
        both = CombinedSafetyFunction([Brightness(score=light), silent], [1.0, 1.0], combination)
        assert torch.equal(host.sample(stg(both), host.text(STAR), steps=2), alone)
    views = host.sample(stg(Views(Brightness(), 3)), host.text(STAR), steps=2)
    assert not torch.equal(views, host.sample(host.model, host.text(STAR), steps=2))


def test_two_workflows_taking_turns(host: Any, either: Any) -> None:
    model = either(Brightness())
    first, second = (host.sample(model, host.text(prompt), steps=2) for prompt in (STAR, HEART))
    plain = host.sample(host.model, host.text(STAR), steps=2)
    for _ in range(2):
        assert torch.equal(host.sample(model, host.text(STAR), steps=2), first)
        assert torch.equal(host.sample(host.model, host.text(STAR), steps=2), plain)
        assert torch.equal(host.sample(model, host.text(HEART), steps=2), second)


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_returns_to_its_level(host: Any, either: Any) -> None:
    class Quiet(Brightness):
        def __call__(self, images: Tensor) -> Assessment:
            found = super().__call__(images)
            self.seen.clear()
            return found

    model = either(Quiet())
    host.sample(model, host.text(STAR), steps=1)
    before = tensor_bytes()
    for _ in range(10):
        host.sample(model, host.text(STAR), steps=1)
    assert tensor_bytes() <= before + 2**16


def test_the_host_leaves_memory_for_gradients(
    host: Any, stg: Any, sdg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sampler_helpers

    asked: list[int] = []
    estimate = comfy.sampler_helpers.estimate_memory

    def watched(model: Any, noise_shape: Any, conds: Any) -> Any:
        asked.append(noise_shape[0])
        return estimate(model, noise_shape, conds)

    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", watched)
    for model in (host.model, stg(Brightness()), sdg(Brightness(), stg(Brightness()))):
        host.sample(model, host.text(STAR), steps=1)
    assert asked == [1, 3, 3]


def test_detectors_are_loaded_along(host: Any, stg: Any) -> None:
    import comfy.model_management

    class WithNetwork(Brightness):
        networks = (torch.nn.Linear(1, 1),)

        def __call__(self, images: Tensor) -> Assessment:
            loaded = [model.model.model for model in comfy.model_management.current_loaded_models]
            assert self.networks[0] in loaded and host.vae.first_stage_model in loaded
            return super().__call__(images)

    function = WithNetwork()
    host.sample(stg(function), host.text(STAR), steps=1)
    assert function.seen


def test_no_random_numbers_are_drawn(host: Any, either: Any) -> None:
    """Ancestral samplers draw from the global generator; a closed gate must leave the image bit-identical."""
    baseline = host.sample(host.model, host.text(STAR), steps=3, sampler="euler_ancestral")
    guided = host.sample(
        either(Brightness(rows=[False])), host.text(STAR), steps=3, sampler="euler_ancestral"
    )
    assert torch.equal(baseline, guided)
    state = torch.get_rng_state()
    Brightness()(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())


def test_with_other_methods_in_any_order(host: Any, stg: Any, sdg: Any) -> None:
    one = sdg(Brightness(), stg(Brightness()), strength=0.02)
    other = stg(Brightness(), sdg(Brightness(), strength=0.02))
    first, second = (host.sample(model, host.text(STAR), steps=3) for model in (one, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, host.sample(stg(Brightness()), host.text(STAR), steps=3))


def test_a_safety_function_without_gradients_says_so(host: Any, either: Any) -> None:
    kept = torch.ones(3, 1, 1)  # an inference tensor, as a careless function of another pack might hold

    with pytest.raises(ValueError, match="Gradients do not flow through brightness"):
        host.sample(
            either(Brightness(score=lambda images: (images * kept).mean((1, 2, 3)))), host.text(STAR), steps=1
        )


def test_a_vae_of_another_family_raises_an_error(host: Any, tiny: ModuleType, either: Any) -> None:
    with pytest.raises(ValueError, match="Connect the VAE that belongs to the model"):
        either(Brightness(), tiny.tiny_model("flux"), tiny.tiny_vae(4))


@pytest.mark.parametrize("name", ["STG", "SDG"])
def test_video_models_raise_an_error(host: Any, stg: Any, sdg: Any, name: str) -> None:
    from safe_guidance.nodes.host.engine.correction import KEY, RunContext
    from safe_guidance.nodes.host.engine.frames import Frames

    (attachment,) = {"STG": stg, "SDG": sdg}[name](Brightness()).model_options[KEY]
    with pytest.raises(ValueError, match=f"{name} works on single images"):
        frames = Frames.of([(1, 16, 5, 8, 8)])
        attachment.correction.begin(RunContext(host.model, frames, torch.zeros(1), None))
