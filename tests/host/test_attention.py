"""Captured cross-attention in the real host: equal to the raw modules, and the image stays bit-identical."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from demo_prompts import HEART, STAR
from safe_guidance.guidance.detect_and_guide.guideline_tokens import GuidelineTokens

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

DEMO_LAYERS = ("input.3.0", "input.5.0", "middle.0.0", "output.0.0", "output.1.0", "output.2.0", "output.3.0")


def random_tokens(width: int, seed: int = 0, rows: int = 3, **options: Any) -> GuidelineTokens:
    return GuidelineTokens(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), **options)


@pytest.fixture
def reading(host: Any) -> Any:
    """Return a correction that only reads maps, and the modules under test."""
    from safe_guidance.nodes.host.attention import capture
    from safe_guidance.nodes.host.attention.map_collector import MapCollector
    from safe_guidance.nodes.host.engine import hooks

    class Reader(hooks.Correction):
        def __init__(self, *concepts: GuidelineTokens) -> None:
            self.concepts = concepts
            self.seen: list[list[torch.Tensor] | None] = []
            self.calls: list[Any] = []

        def patch(self, model: Any) -> None:
            def receiver(run: Any) -> Callable[[Any], None]:
                collector = run.state_of(self)

                def receive(call: Any) -> None:
                    self.calls.append(call)
                    collector.receive(call)

                return receive

            capture.listen(model, receiver)

        def begin(self, context: Any) -> Any:
            return MapCollector(self.concepts)

        def is_active(self, level: Any) -> bool:
            return True

        def correct(self, step: Any, state: Any) -> None:
            self.seen.append(state.take(step))

    return SimpleNamespace(capture=capture, Reader=Reader, attach=hooks.attach)


class RawQueries:
    """Forward hooks on the modules that record the output of every query projection."""

    def __init__(self, unet: Any, capture: Any, names: tuple[str, ...]) -> None:
        self.outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self._handles = [
            capture.attention_layer(unet, name).to_q.register_forward_hook(
                lambda module, inputs, output, name=name: self.outputs[name].append(output.clone())
            )
            for name in names
        ]

    def __enter__(self) -> RawQueries:
        return self

    def __exit__(self, *unused: object) -> None:
        for handle in self._handles:
            handle.remove()


def recomputed(
    unet: Any,
    capture: Any,
    raw: RawQueries,
    step: int,
    rows: slice,
    embeddings: torch.Tensor,
    size: tuple[int, int],
) -> Any:
    """Recompute token maps by plain loops over heads in float64."""
    maps = []
    for name, outputs in raw.outputs.items():
        module = capture.attention_layer(unet, name)
        query, keys = outputs[step][rows].double(), embeddings.double() @ module.to_k.weight.double().T
        width = query.shape[-1] // module.heads
        heads = []
        for head in range(module.heads):
            part = slice(head * width, (head + 1) * width)
            heads.append((query[..., part] @ keys[:, part].T / width**0.5).softmax(-1))
        mean = torch.stack(heads).mean(0).transpose(1, 2)
        height = round((mean.shape[-1] * size[0] / size[1]) ** 0.5)
        maps.append(
            F.interpolate(mean.unflatten(-1, (height, -1)), size=size, mode="bilinear", align_corners=False)
        )
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize(("width", "height"), [(128, 128), (192, 96)])
def test_maps_equal_those_of_the_raw_modules(host: Any, reading: Any, width: int, height: int) -> None:
    text, latent = host.text(STAR, HEART), host.empty_latent(2, width, height)
    tokens = random_tokens(96)
    unet = host.model.model.diffusion_model
    with RawQueries(unet, reading.capture, DEMO_LAYERS) as raw:
        baseline = host.sample(host.model, text, latent, steps=3)
    reader = reading.Reader(tokens)
    assert torch.equal(host.sample(reading.attach(host.model, reader), text, latent, steps=3), baseline)
    assert len(reader.seen) == 3
    for step, maps in enumerate(reader.seen):
        assert maps is not None
        # The host puts the negative branch first: rows 2 and 3 of the four are the positive one's.
        expected = recomputed(
            unet, reading.capture, raw, step, slice(2, 4), tokens.embeddings, (height // 4, width // 4)
        )
        torch.testing.assert_close(maps[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_layers_can_be_named(host: Any, reading: Any) -> None:
    chosen, usual = random_tokens(96, layers=("output.3.0", "output.5.0")), random_tokens(96)
    reader = reading.Reader(chosen, usual)
    host.sample(reading.attach(host.model, reader), host.text(STAR), steps=1)
    assert {c.name: c.factor for c in reader.calls} == {
        **{"input.3.0": 2, "output.2.0": 2, "output.3.0": 2, "output.5.0": 1},
        **{"input.5.0": 4, "middle.0.0": 4, "output.0.0": 4, "output.1.0": 4},
    }
    maps = reader.seen[0]
    assert maps is not None and not torch.equal(maps[0], maps[1])


def test_layers_by_scale_in_models_of_the_usual_sizes(host: Any, reading: Any, tiny: Any) -> None:
    """SD 1.x has five layers each at a half and a quarter of the latent; SDXL has none at its full size."""
    for family, latent, count in (
        ("sd1", (4, 16, 16), 10),
        ("sd1", (4, 17, 25), 10),
        ("sdxl", (4, 16, 16), None),
    ):
        model = tiny.tiny_model(family)
        reader = reading.Reader(random_tokens(tiny.WIDTH))
        sample_tiny(tiny, reading.attach(model, reader), latent)
        read = [c for c in reader.calls if c.factor in (2, 4)]
        assert {c.factor for c in read} == {2, 4}
        assert count is None or len(read) == count
        maps = reader.seen[0]
        assert maps is not None and maps[0].shape == (1, 3, *latent[1:])
        torch.testing.assert_close(maps[0].sum(1), torch.ones(1, *latent[1:]))


def sample_tiny(
    tiny: Any, model: Any, shape: tuple[int, int, int], steps: int = 1, cfg: float = 3.0
) -> torch.Tensor:
    import comfy.sample

    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    positive, negative = tiny.tiny_conditioning(1), tiny.tiny_conditioning(2)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        "euler",
        "normal",
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=1,
    )


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_reading_changes_no_bit_in_any_family(host: Any, reading: Any, tiny: Any, family: str) -> None:
    model = tiny.tiny_model(family)
    reader = reading.Reader(random_tokens(tiny.WIDTH))
    assert torch.equal(
        sample_tiny(tiny, reading.attach(model, reader), (4, 16, 24), 2),
        sample_tiny(tiny, model, (4, 16, 24), 2),
    )
    assert all(maps is not None for maps in reader.seen)


def test_half_precision_is_read_too(host: Any, reading: Any, tiny: Any) -> None:
    model = tiny.tiny_model("sd1", torch.bfloat16, torch.bfloat16)
    reader = reading.Reader(random_tokens(tiny.WIDTH))
    assert torch.equal(
        sample_tiny(tiny, reading.attach(model, reader), (4, 16, 16)), sample_tiny(tiny, model, (4, 16, 16))
    )
    assert reader.seen[0] is not None and reader.seen[0][0].dtype == torch.float32


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_models_without_cross_attention_are_named(reading: Any, tiny: Any, family: str) -> None:
    with pytest.raises(ValueError, match="cannot be learnt from the attention of this model"):
        reading.capture.attention_width(tiny.tiny_model(family))


def test_every_sample_of_a_batch_has_its_own_map(host: Any, reading: Any) -> None:
    tokens = random_tokens(96)
    both, alone = reading.Reader(tokens), reading.Reader(tokens)
    latent = {"samples": torch.zeros(1, 4, 32, 32), "batch_index": [1]}
    host.sample(reading.attach(host.model, both), host.text(STAR, HEART), steps=1)
    host.sample(reading.attach(host.model, alone), host.text(HEART), latent, steps=1)
    assert both.seen[0] is not None and alone.seen[0] is not None
    torch.testing.assert_close(both.seen[0][0][1:], alone.seen[0][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["cfg", "basic", "dual", "perpendicular", "pair"])
def test_the_positive_branch_is_found_under_every_guider(host: Any, reading: Any, name: str) -> None:
    import comfy.sample
    import comfy.samplers
    from comfy.samplers import CFGGuider
    from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG, Guider_DualModel
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    star, heart, empty = host.text(STAR), host.text(HEART), host.text("")
    sigmas = comfy.samplers.calculate_sigmas(host.model.get_model_object("model_sampling"), "normal", 1)
    latent = torch.zeros(1, 4, 32, 32)
    noise = comfy.sample.prepare_noise(latent, 3)

    def maps_under(kind: str) -> torch.Tensor:
        reader = reading.Reader(random_tokens(96))
        model = reading.attach(host.model, reader)
        made = {
            "cfg": CFGGuider,
            "basic": Guider_Basic,
            "dual": Guider_DualCFG,
            "perpendicular": Guider_PerpNeg,
        }
        guider = Guider_DualModel(model, host.model) if kind == "pair" else made[kind](model)
        conds = {"basic": (star,), "dual": (star, heart, empty), "perpendicular": (star, heart, empty)}
        guider.set_conds(*conds.get(kind, (star, empty)))
        scales = {"dual": (3.0, 3.0), "perpendicular": (5.0, 1.0)}
        if kind != "basic":
            guider.set_cfg(*scales.get(kind, (5.0,)))
        guider.sample(
            noise, latent, comfy.samplers.sampler_object("euler"), sigmas, seed=3, disable_pbar=True
        )
        assert len(reader.seen) == 1 and reader.seen[0] is not None
        return reader.seen[0][0]

    torch.testing.assert_close(maps_under(name), maps_under("cfg"), atol=1e-5, rtol=1e-5)


def scaled_context(hidden: Any, context: Any, value: Any, extra: Any) -> Any:
    """Patch of another pack that changes the layer's input, as a hypernetwork does."""
    return hidden, context * 1.1, value


def second_attention(q: Any, k: Any, v: Any, extra: Any) -> Any:
    """Replace the attention of a layer, as an image adapter does."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q, k, v, extra["n_heads"]) + 0.1 * optimized_attention(
        q, k[:, :4], v[:, :4], extra["n_heads"]
    )


def other_packs(host: Any, kind: str) -> Any:
    model = host.model.clone()
    if kind == "context":
        model.set_model_attn2_patch(scaled_context)
    elif kind == "replace":
        for block in (
            ("input", 3),
            ("input", 5),
            ("middle", 0),
            ("output", 0),
            ("output", 1),
            ("output", 2),
            ("output", 3),
        ):
            model.set_model_attn2_replace(second_attention, *block)
    elif kind == "lora":
        generator = torch.Generator().manual_seed(5)
        weights = {
            k: w
            for k, w in host.model.model.state_dict().items()
            if k.endswith(("attn2.to_q.weight", "attn2.to_k.weight"))
        }
        model.add_patches(
            {k: ("diff", (0.05 * torch.randn(w.shape, generator=generator),)) for k, w in weights.items()}
        )
    elif kind == "merging tokens":
        from comfy_extras.nodes_tomesd import TomePatchModel

        return TomePatchModel.execute(model, 0.5).args[0]
    return model


@pytest.mark.parametrize("kind", ["context", "replace", "lora", "merging tokens"])
def test_other_packs_patches_keep_working(host: Any, reading: Any, kind: str) -> None:
    patched = other_packs(host, kind)
    baseline = host.sample(patched, host.text(STAR), steps=2)
    reader, plain = reading.Reader(random_tokens(96)), reading.Reader(random_tokens(96))
    assert torch.equal(host.sample(reading.attach(patched, reader), host.text(STAR), steps=2), baseline)
    assert all(maps is not None for maps in reader.seen) and len(reader.seen) == 2
    host.sample(reading.attach(host.model, plain), host.text(STAR), steps=2)
    # What changes the model's hidden states changes the maps; token merging draws at random.
    if kind in ("context", "replace", "lora"):
        assert not torch.equal(reader.seen[1][0], plain.seen[1][0])
        assert not torch.equal(baseline, host.sample(host.model, host.text(STAR), steps=2))


def test_tiled_self_attention_is_none_of_its_business(host: Any, reading: Any, tiny: Any) -> None:
    from comfy_extras.nodes_hypertile import HyperTile

    tiled = HyperTile.execute(tiny.tiny_model("sd1"), 128, 2, 0, False)[0]
    reader = reading.Reader(random_tokens(tiny.WIDTH))
    # Its tiles are drawn at random.
    torch.manual_seed(7)
    baseline = sample_tiny(tiny, tiled, (4, 32, 32))
    torch.manual_seed(7)
    assert torch.equal(sample_tiny(tiny, reading.attach(tiled, reader), (4, 32, 32)), baseline)
    assert reader.seen[0] is not None and reader.seen[0][0].shape == (1, 3, 32, 32)


def test_areas_are_put_in_their_places(host: Any, reading: Any) -> None:
    star, heart = host.text(STAR), host.text(HEART)
    left, right = (
        [[cond[0][0], {**cond[0][1], "area": (32, 16, 0, x)}]] for cond, x in ((star, 0), (heart, 16))
    )
    reader = reading.Reader(random_tokens(96))
    host.sample(reading.attach(host.model, reader), left + right, host.empty_latent(1), steps=1)
    assert reader.seen[0] is not None
    maps = reader.seen[0][0]
    assert maps.shape == (1, 3, 32, 32)
    torch.testing.assert_close(maps.sum(1), torch.ones(1, 32, 32), atol=1e-4, rtol=1e-4)
    crops = {c.latent_size for c in reader.calls}
    assert crops == {(32, 16)}


def test_masked_conditionings_are_averaged_by_their_masks(host: Any, reading: Any) -> None:
    star, heart = host.text(STAR), host.text(HEART)
    mask = torch.zeros(1, 128, 128)
    mask[..., :64] = 1
    options = {"mask": mask, "set_area_to_bounds": False, "mask_strength": 1.0}
    both, alone = reading.Reader(random_tokens(96)), reading.Reader(random_tokens(96))
    conds = [[star[0][0], options], [heart[0][0], {**options, "mask": 1 - mask}]]
    host.sample(reading.attach(host.model, both), conds, host.empty_latent(1), steps=1)
    host.sample(reading.attach(host.model, alone), star, host.empty_latent(1), steps=1)
    assert both.seen[0] is not None and alone.seen[0] is not None
    torch.testing.assert_close(both.seen[0][0][..., :15], alone.seen[0][0][..., :15], atol=1e-5, rtol=1e-5)
