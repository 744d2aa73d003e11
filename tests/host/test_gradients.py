"""Gradients inside the real host.

Every family and stored type, against finite differences and plain autograd; what stays untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

SIZE = 8
FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux")


@pytest.fixture
def inside(host: Any, tiny: ModuleType) -> Callable[..., Any]:
    """Return the result of `look(evaluation)`, called once in the first model evaluation of a real
    sampling run.
    """
    from safe_guidance.nodes.host.engine import hooks

    def run(
        model: Any,
        look: Callable[[Any], Any],
        positive: list[Any] | None = None,
        batch: int = 1,
        cfg: float = 3.0,
    ) -> Any:
        found: list[Any] = []

        class Look(hooks.Correction):
            def is_active(self, level: Any) -> bool:
                return not found

            def steer(self, step: Any, state: Any) -> None:
                found.append(look(step))

            def correct(self, step: Any, state: Any) -> None:
                return None

        positive = positive or tiny.tiny_conditioning(0, batch)
        latent = {"samples": torch.zeros(batch, tiny.latent_channels(model), SIZE, SIZE)}
        args = (1, 2, cfg, "euler", "normal", positive, tiny.tiny_conditioning(9), latent)
        host.nodes.common_ksampler(hooks.attach(model, Look()), *args)
        return found[0]

    return run


@pytest.fixture
def gradients(host: Any) -> ModuleType:
    from safe_guidance.nodes.host.autograd import gradients

    return gradients


def embeddings(evaluation: Any) -> list[Any]:
    from safe_guidance.nodes.host.autograd import conditioning_entries

    return conditioning_entries.embeddings(evaluation)


def cotangent(evaluation: Any) -> torch.Tensor:
    return torch.randn(evaluation.x.shape, generator=torch.Generator().manual_seed(5))


def predicted(evaluation: Any, values: list[Any]) -> torch.Tensor:
    """Return the positive branch's prediction at other embeddings."""
    import comfy.samplers

    from safe_guidance.nodes.host.autograd.conditioning_entries import with_embedding

    entries = [with_embedding(e, v) for e, v in zip(evaluation.guider.conds["positive"], values)]
    return comfy.samplers.calc_cond_batch(
        evaluation.guider.inner_model, [entries], evaluation.x, evaluation.timestep, evaluation.model_options
    )[0]


def every_row(evaluation: Any) -> torch.Tensor:
    return torch.arange(len(evaluation.x))


def finite_difference(evaluation: Any, direction: torch.Tensor, step: float = 1e-2) -> float:
    """Differentiate sum(cotangent * prediction) along a direction of the first embedding by central
    differences.
    """
    (value, *rest), weights = embeddings(evaluation), cotangent(evaluation).double()
    up, down = (predicted(evaluation, [value + s * step * direction, *rest]).double() for s in (1, -1))
    return float(((up - down) * weights).sum() / (2 * step))


def both_derivatives(gradients: ModuleType, evaluation: Any) -> tuple[float, float]:
    """Return the derivative along the gradient: the gradient's norm, and the finite difference."""
    values = embeddings(evaluation)
    (found,) = gradients.text_gradients(evaluation, values, cotangent(evaluation), every_row(evaluation))
    direction = found / found.norm()
    return float(found.norm()), finite_difference(evaluation, direction)


@pytest.mark.parametrize(
    ("family", "stored"),
    [(family, torch.float32) for family in FAMILIES]
    + [
        (family, dtype)
        for family in FAMILIES
        for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    ],
)
def test_finite_differences(
    gradients: ModuleType, inside: Any, tiny: ModuleType, family: str, stored: torch.dtype
) -> None:
    """Weights of any stored type are cast to float32 when used, as on hardware without that type."""
    model = tiny.tiny_model(family, stored, torch.float32)
    norm, difference = inside(model, lambda evaluation: both_derivatives(gradients, evaluation))
    assert norm > 1e-4
    assert difference == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_networks_give_the_direction_of_float32_ones(
    gradients: ModuleType, inside: Any, tiny: ModuleType, family: str
) -> None:
    def look(evaluation: Any) -> torch.Tensor:
        values = embeddings(evaluation)
        return gradients.text_gradients(evaluation, values, cotangent(evaluation), every_row(evaluation))[
            0
        ].float()

    low = inside(tiny.tiny_model(family, torch.bfloat16), look)
    exact = inside(tiny.tiny_model(family, torch.bfloat16, torch.float32), look)
    assert torch.nn.functional.cosine_similarity(low.flatten(), exact.flatten(), dim=0) > 0.9
    assert low.norm() == pytest.approx(float(exact.norm()), rel=0.1)


@contextmanager
def plain_autograd(*networks: Any, checkpointed: bool = False) -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3"])
def test_equal_to_plain_autograd(
    gradients: ModuleType, inside: Any, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The weights are made outside inference mode. (The host's Flux changes in place what autograd saved.)"""
    with torch.inference_mode(False):
        model = tiny.tiny_model(family)

    def look(evaluation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        args = (evaluation, embeddings(evaluation), cotangent(evaluation), every_row(evaluation))
        ours = gradients.text_gradients(*args)[0]
        with monkeypatch.context() as patch:
            patch.setattr(gradients, "differentiable", plain_autograd)
            return ours, gradients.text_gradients(*args)[0]

    ours, plain = inside(model, look)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_change_nothing_but_memory(
    gradients: ModuleType, inside: Any, tiny: ModuleType, family: str
) -> None:
    def look(evaluation: Any) -> list[tuple[torch.Tensor, int]]:
        found = []
        for checkpointed in (False, True):
            saved: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: (saved.append(t.nbytes), t)[1], lambda t: t
            ):
                args = (
                    evaluation,
                    embeddings(evaluation),
                    cotangent(evaluation),
                    every_row(evaluation),
                )
                found.append((gradients.text_gradients(*args, checkpointed=checkpointed)[0], sum(saved)))
        return found

    (plain, plain_bytes), (checkpointed, checkpointed_bytes) = inside(tiny.tiny_model(family), look)
    torch.testing.assert_close(plain, checkpointed, rtol=1e-3, atol=1e-5)
    # Hooks outside a checkpoint see only what is kept between the two passes.
    assert checkpointed_bytes < plain_bytes / 2


def test_rows_are_independent(gradients: ModuleType, inside: Any, tiny: ModuleType) -> None:
    def look(evaluation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        values, weights = embeddings(evaluation), cotangent(evaluation)
        some = torch.tensor([2, 0])
        return (
            gradients.text_gradients(evaluation, values, weights, every_row(evaluation))[0][some],
            gradients.text_gradients(evaluation, values, weights[some], some)[0],
        )

    together, alone = inside(tiny.tiny_model("sdxl"), look, batch=3)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_latent_gradient_by_finite_differences(
    gradients: ModuleType, inside: Any, tiny: ModuleType, family: str
) -> None:
    def look(evaluation: Any) -> tuple[float, float]:
        weights = cotangent(evaluation)
        found = gradients.latent_gradient(evaluation, weights, every_row(evaluation))
        direction = found / found.norm()

        def value(shift: float) -> torch.Tensor:
            x = evaluation.x + shift * direction
            return (
                (evaluation.guider.predict_noise(x, evaluation.timestep, evaluation.model_options) * weights)
                .double()
                .sum()
            )

        step = 1e-3 * float(evaluation.x.norm())
        return float(found.norm()), float((value(step) - value(-step)) / (2 * step))

    norm, difference = inside(tiny.tiny_model(family), look)
    assert difference == pytest.approx(norm, rel=2e-2)


def test_what_the_host_loaded_is_untouched(gradients: ModuleType, inside: Any, tiny: ModuleType) -> None:
    import comfy.model_management

    model = tiny.tiny_model("sd3")
    network = model.model.diffusion_model
    before = {
        name: (id(p), p.is_inference(), p._version if not p.is_inference() else 0)
        for name, p in network.named_parameters()
    }
    values = {name: p.clone() for name, p in network.named_parameters()}

    def look(evaluation: Any) -> None:
        attributes = {name: set(vars(module)) for name, module in network.named_modules()}
        both_derivatives(gradients, evaluation)
        assert attributes == {name: set(vars(module)) for name, module in network.named_modules()}

    inside(model, look)
    after = {
        name: (id(p), p.is_inference(), p._version if not p.is_inference() else 0)
        for name, p in network.named_parameters()
    }
    assert before == after and all(inference for _, inference, _ in before.values())
    assert all(torch.equal(p, values[name]) for name, p in network.named_parameters())
    assert not comfy.model_management.in_training


def test_a_lora_counts(gradients: ModuleType, inside: Any, tiny: ModuleType) -> None:
    """The host merges weight patches when it loads the model."""
    model = tiny.tiny_model("sd1")
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    shape = model.model.state_dict()[key].shape
    patched = model.clone()
    patched.add_patches(
        {key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(1)),))}, 3.0
    )

    def look(evaluation: Any) -> tuple[torch.Tensor, float, float]:
        args = (evaluation, embeddings(evaluation), cotangent(evaluation), every_row(evaluation))
        return gradients.text_gradients(*args)[0], *both_derivatives(gradients, evaluation)

    with_lora, norm, difference = inside(patched, look)
    without, _, _ = inside(model, look)
    assert difference == pytest.approx(norm, rel=1e-2)
    assert not torch.allclose(with_lora, without, rtol=1e-3)


def test_weights_fetched_while_running_count(gradients: ModuleType, inside: Any, tiny: ModuleType) -> None:
    """The host uses functions on weights for LoRA on models that do not fit into memory."""
    model = tiny.tiny_model("sd1")
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_k

    def look(evaluation: Any) -> tuple[float, float, float]:
        plain = both_derivatives(gradients, evaluation)[0]
        layer.weight_function = [lambda weight: weight * 3]
        return plain, *both_derivatives(gradients, evaluation)

    plain, norm, difference = inside(model, look)
    assert difference == pytest.approx(norm, rel=1e-2)
    assert plain != pytest.approx(norm, rel=1e-3)


def test_a_controlnet_counts(host: Any, gradients: ModuleType, inside: Any, tiny: ModuleType) -> None:
    """A ControlNet sees the text too, so gradients flow through it. Each of its hints belongs to one
    sample.
    """
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = {
        k: list(v) if isinstance(v, list) else v
        for k, v in tiny.UNET.items()
        if k not in ("out_channels", "transformer_depth_output")
    }
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, operations=comfy.ops.disable_weight_init, dtype=torch.float32
    )
    network.load_state_dict(tiny.random_weights(network, 7))
    control = comfy.controlnet.ControlNet(network)
    conditioning = host.nodes.ControlNetApplyAdvanced().apply_controlnet(
        tiny.tiny_conditioning(0, 2),
        tiny.tiny_conditioning(9),
        control,
        torch.rand(2, 64, 64, 3),
        0.8,
        0.0,
        1.0,
    )[0]

    def look(evaluation: Any) -> tuple[float, float, torch.Tensor, torch.Tensor]:
        values, weights = embeddings(evaluation), cotangent(evaluation)
        whole = gradients.text_gradients(evaluation, values, weights, every_row(evaluation))[0]
        second = gradients.text_gradients(evaluation, values, weights[1:], torch.tensor([1]))[0]
        return *both_derivatives(gradients, evaluation), whole[1:], second

    norm, difference, whole, second = inside(tiny.tiny_model("sd1"), look, positive=conditioning, batch=2)
    assert difference == pytest.approx(norm, rel=1e-2)
    torch.testing.assert_close(whole, second, rtol=1e-3, atol=1e-6)


def test_other_packs_patches(gradients: ModuleType, inside: Any, tiny: ModuleType) -> None:
    """Gradients flow through a patch that can be differentiated. With one that writes in place, they
    are taken without patches.
    """
    model = tiny.tiny_model("sd1")
    scaled, in_place = model.clone(), model.clone()
    scaled.set_model_attn2_patch(lambda n, context, value, options: (n, context * 2, value * 2))

    def overwrite(h: Any, hsp: Any, options: Any) -> Any:
        h[:, : h.shape[1] // 2] = torch.exp(
            h[:, : h.shape[1] // 2], out=torch.empty_like(h[:, : h.shape[1] // 2])
        )
        return h, hsp

    in_place.set_model_output_block_patch(overwrite)
    norm, difference = inside(scaled, lambda evaluation: both_derivatives(gradients, evaluation))
    assert difference == pytest.approx(norm, rel=1e-2)

    def look(evaluation: Any) -> torch.Tensor:
        return gradients.text_gradients(
            evaluation, embeddings(evaluation), cotangent(evaluation), every_row(evaluation)
        )[0]

    assert torch.isfinite(inside(in_place, look)).all()


def test_several_positives_and_those_that_are_not_active(
    host: Any, gradients: ModuleType, inside: Any, tiny: ModuleType
) -> None:
    from nodes import ConditioningCombine, ConditioningSetArea, ConditioningSetTimestepRange

    left = ConditioningSetArea().append(tiny.tiny_conditioning(1), 32, 64, 0, 0, 1.0)[0]
    late = ConditioningSetTimestepRange().set_range(tiny.tiny_conditioning(2), 0.9, 1.0)[0]
    whole = tiny.tiny_conditioning(3)
    combined = ConditioningCombine().combine(ConditioningCombine().combine(left, late)[0], whole)[0]

    def look(evaluation: Any) -> tuple[list[Any], list[float]]:
        values, weights = embeddings(evaluation), cotangent(evaluation)
        found = gradients.text_gradients(evaluation, values, weights, every_row(evaluation))
        slopes = []
        for index in (0, 2):
            direction, moved = found[index] / found[index].norm(), []
            for sign in (1, -1):
                shifted = [v + sign * 5e-3 * direction if i == index else v for i, v in enumerate(values)]
                moved.append((predicted(evaluation, shifted) * weights).double().sum())
            slopes.append(float((moved[0] - moved[1]) / 1e-2))
        return found, slopes

    found, slopes = inside(tiny.tiny_model("sd1"), look, positive=combined)
    assert found[1] is None
    assert slopes == [
        pytest.approx(float(found[0].norm()), rel=2e-2),
        pytest.approx(float(found[2].norm()), rel=2e-2),
    ]
    # Where nothing is active at this noise level, there is nothing to guide.
    assert inside(tiny.tiny_model("sd1"), lambda e: look_only(gradients, e), positive=late) == [None]


def look_only(gradients: ModuleType, evaluation: Any) -> list[Any]:
    return gradients.text_gradients(
        evaluation, embeddings(evaluation), cotangent(evaluation), every_row(evaluation)
    )


def test_a_model_without_gradients_says_so(gradients: ModuleType, inside: Any, tiny: ModuleType) -> None:
    model = tiny.tiny_model("sd1")
    network = model.model.diffusion_model

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    forward = network.out.forward
    network.out.forward = lambda x: forward(NoBackward.apply(x))
    with pytest.raises(ValueError, match="Gradients do not flow through this model"):
        inside(model, lambda evaluation: look_only(gradients, evaluation))


def test_interrupting_a_gradient_pass(gradients: ModuleType, inside: Any, tiny: ModuleType) -> None:
    import comfy.model_management

    model = tiny.tiny_model("sd1")
    attributes: dict[str, set[str]] = {}

    def look(evaluation: Any) -> list[Any]:
        attributes.update(
            (name, set(vars(module))) for name, module in model.model.diffusion_model.named_modules()
        )

        def interrupt(_: torch.Tensor) -> None:
            comfy.model_management.interrupt_current_processing(True)

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: (interrupt(t), t)[1]):
            return look_only(gradients, evaluation)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        inside(model, look)
    assert not comfy.model_management.in_training
    assert attributes == {
        name: set(vars(module)) for name, module in model.model.diffusion_model.named_modules()
    }
    norm, difference = inside(model, lambda evaluation: both_derivatives(gradients, evaluation))
    assert difference == pytest.approx(norm, rel=1e-2)


def test_short_memory_goes_row_by_row(host: Any, gradients: ModuleType) -> None:
    calls: list[tuple[list[int], bool]] = []

    def compute(rows: torch.Tensor, checkpointed: bool) -> list[torch.Tensor | None]:
        calls.append((rows.tolist(), checkpointed))
        if len(rows) > 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return [rows[:, None].float(), None]

    first, second = gradients.in_parts(torch.tensor([0, 2, 5]), compute)
    assert first.flatten().tolist() == [0, 2, 5] and second is None
    assert calls == [([0, 2, 5], False), ([0], True), ([2], True), ([5], True)]


def test_setting_embeddings_leaves_the_workflows_conditioning_alone(inside: Any, tiny: ModuleType) -> None:
    positive = tiny.tiny_conditioning(0)
    before = positive[0][0].clone()

    def look(evaluation: Any) -> SimpleNamespace:
        from safe_guidance.nodes.host.autograd import conditioning_entries

        (value,) = embeddings(evaluation)
        conditioning_entries.set_embeddings(evaluation, [value + 1])
        return SimpleNamespace(now=embeddings(evaluation)[0])

    now = inside(tiny.tiny_model("sd1"), look, positive=positive).now
    assert torch.equal(positive[0][0], before)
    torch.testing.assert_close(now, before + 1)
