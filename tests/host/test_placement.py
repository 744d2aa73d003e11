"""Attention maps where the model gets parts of the latents: tiles of other nodes, rolled latents, windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from demo_prompts import HEART, STAR
from safe_guidance.guidance.detect_and_guide.guideline_tokens import GuidelineTokens

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

SIGMA = 3.0


def in_tiles(
    cut: Callable[[Tensor], list[Tensor]], join: Callable[[list[Tensor]], Tensor], together: bool
) -> Any:
    """Return a model function wrapper that evaluates tiles, all in one call or one by one."""

    def wrapper(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        c, tiles = args["c"], cut(args["input"])
        if not together:
            return join([apply_model(tile, args["timestep"], **c) for tile in tiles])
        many = {
            key: value.repeat(len(tiles), *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
            for key, value in c.items()
        }
        out = apply_model(torch.cat(tiles), args["timestep"].repeat(len(tiles)), **many)
        return join(list(out.chunk(len(tiles))))

    return wrapper


def halves(x: Tensor) -> list[Tensor]:
    return [x[..., :16].clone(), x[..., 16:].clone()]


def beside(tiles: list[Tensor]) -> Tensor:
    return torch.cat(tiles, -1)


def maps_of(host: Any, model: Any, x: Tensor, positive: list[Any]) -> Any:
    """Return the maps (B, 1 + K, h, w) that a method gets at one evaluation, or None, and its collector."""
    import comfy.samplers

    from safe_guidance.nodes.host.attention.capture import listen
    from safe_guidance.nodes.host.attention.map_collector import MapCollector
    from safe_guidance.nodes.host.engine.correction import Correction
    from safe_guidance.nodes.host.engine.hooks import attach

    width = host.text(STAR)[0][0].shape[-1]
    tokens = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    collector = MapCollector((GuidelineTokens(tokens),))

    class Reads(Correction):
        seen: Any = None

        def patch(self, model: Any) -> None:
            listen(model, lambda run: collector.receive)

        def is_active(self, level: Any) -> bool:
            return True

        def correct(self, step: Any, state: None) -> None:
            self.seen = collector.take(step)

    reads = Reads()
    guider = comfy.samplers.CFGGuider(attach(model, reads))
    guider.set_conds(positive, host.text(""))
    guider.set_cfg(5.0)
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = torch.tensor([SIGMA, 0.0])
    # The host scales the noise; what the model gets is the same in every run.
    guider.sample(x, torch.zeros_like(x), sampler, sigmas, seed=0, disable_pbar=True)
    return reads.seen, collector


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("together", [False, True])
def test_tiles_are_heard_as_if_each_were_the_image(host: Any, noise: Tensor, together: bool) -> None:
    tiled = host.model.clone()
    tiled.set_model_unet_function_wrapper(in_tiles(halves, beside, together))
    positive = host.text(STAR, HEART)
    (found,), _ = maps_of(host, tiled, noise, positive)
    for half, part in ((slice(0, 16), halves(noise)[0]), (slice(16, 32), halves(noise)[1])):
        (alone,), _ = maps_of(host, host.model, part, positive)
        torch.testing.assert_close(found[..., half], alone, atol=1e-4, rtol=0)


def test_rolled_latents_are_heard_at_their_place(host: Any, noise: Tensor) -> None:
    rolled = host.model.clone()
    rolled.set_model_unet_function_wrapper(
        in_tiles(lambda x: [x.roll(8, -1)], lambda tiles: tiles[0].roll(-8, -1), False)
    )
    (found,), _ = maps_of(host, rolled, noise, host.text(STAR, HEART))
    (elsewhere,), _ = maps_of(host, host.model, noise.roll(8, -1), host.text(STAR, HEART))
    torch.testing.assert_close(found, elsewhere.roll(-8, -1), atol=1e-4, rtol=0)


def test_equal_samples_of_a_batch_keep_their_own_text(host: Any, noise: Tensor) -> None:
    tiled = host.model.clone()
    tiled.set_model_unet_function_wrapper(in_tiles(halves, beside, True))
    twice = noise[:1].repeat(2, 1, 1, 1)
    (found,), _ = maps_of(host, tiled, twice, host.text(STAR, HEART))
    (alone,), _ = maps_of(host, host.model, halves(twice)[0], host.text(STAR, HEART))
    torch.testing.assert_close(found[..., :16], alone, atol=1e-4, rtol=0)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize(("dim", "length"), [(0, 1), (3, 16)])
def test_context_windows_are_heard_at_their_place(host: Any, noise: Tensor, dim: int, length: int) -> None:
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    settings = ("standard_static", 1, False, "pyramid", dim, False)
    model = ContextWindowsManualNode.execute(host.model, length, 0, *settings, causal_window_fix=False).args[
        0
    ]
    positive = host.text(STAR)
    # The host itself cannot cut rows or columns of several images.
    noise = noise if dim == 0 else noise[:1]
    (found,), _ = maps_of(host, model, noise, positive)
    parts = list(noise.split(1)) if dim == 0 else halves(noise)
    alone = [maps_of(host, host.model, part, positive)[0][0] for part in parts]
    torch.testing.assert_close(found, torch.cat(alone, dim), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["self", "perturbed"])
def test_what_attention_guidance_evaluates_is_not_heard(host: Any, noise: Tensor, name: str) -> None:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    guided = (
        SelfAttentionGuidance.execute(host.model, 0.5, 2.0)
        if name == "self"
        else PerturbedAttentionGuidance.execute(host.model, 3.0)
    ).args[0]
    (found,), _ = maps_of(host, guided, noise, host.text(STAR, HEART))
    (plain,), _ = maps_of(host, host.model, noise, host.text(STAR, HEART))
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("together", [False, True])
def test_skip_features_are_damped_tile_by_tile(host: Any, noise: Tensor, together: bool) -> None:
    import comfy.samplers

    from safe_guidance.nodes.host.engine.hooks import attach
    from safe_guidance.nodes.host.methods.safree_reattention import ReattentionCorrection

    def denoised(model: Any, x: Tensor, deep: float = 0.5, shallow: float = 0.2) -> Tensor:
        correction = ReattentionCorrection(host.text(HEART), deep, shallow)
        guider = comfy.samplers.CFGGuider(attach(model, correction))
        guider.set_conds(host.text(STAR), host.text(""))
        guider.set_cfg(5.0)
        sampler = comfy.samplers.sampler_object("euler")
        sigmas = torch.tensor([SIGMA, 0.0])
        return guider.sample(x, torch.zeros_like(x), sampler, sigmas, seed=0, disable_pbar=True)

    tiled = host.model.clone()
    tiled.set_model_unet_function_wrapper(in_tiles(halves, beside, together))
    alone = beside([denoised(host.model, half) for half in halves(noise[:1])])
    unchanged = denoised(tiled, noise[:1], 1.0, 1.0)
    # Damping is a switch: where both prompts have equal features, the rounding of the batch decides.
    assert (denoised(tiled, noise[:1]) - alone).norm() < 0.3 * (unchanged - alone).norm()


def test_resized_latents_are_not_guessed_and_counted(host: Any, noise: Tensor) -> None:
    import torch.nn.functional as F

    resized = host.model.clone()
    resized.set_model_unet_function_wrapper(
        in_tiles(
            lambda x: [F.interpolate(x, scale_factor=0.5)],
            lambda tiles: F.interpolate(tiles[0], scale_factor=2.0),
            False,
        )
    )
    found, collector = maps_of(host, resized, noise, host.text(STAR, HEART))
    assert found is None and collector.unplaced == 1


def test_values_are_found_wherever_they_went(host: Any) -> None:
    from safe_guidance.nodes.host.attention.placement import positions_in

    whole = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(2))
    padded = torch.cat([whole[:1, :, :, :3], torch.zeros(1, 4, 6, 1)], -1)
    cut = {"mirrored": whole.flip(-1), "spread": whole[..., ::2, ::2], "second": whole[1:, :, 2:5, 4:]}
    every = torch.arange(96).view(2, 6, 8)
    assert torch.equal(positions_in(cut["mirrored"], whole)[0], every.flip(-1))
    assert torch.equal(positions_in(cut["spread"], whole)[0], every[:, ::2, ::2])
    assert torch.equal(positions_in(cut["second"], whole)[0], every[1:, 2:5, 4:])
    assert positions_in(cut["second"], whole)[1].tolist() == [1]
    assert torch.equal(positions_in(padded, whole)[0][..., :3], every[:1, :, :3])
    assert bool((positions_in(padded, whole)[0][..., 3] == -1).all())
