"""Concepts in joint attention, in the real host. Small models of random weights: plumbing, not quality."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safe_guidance.guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

FAMILIES = ("flux", "sd3")
CROSS_FAMILIES = ("wan", "cosmos_predict2")
MORE_FAMILIES = (*FAMILIES, "chroma", "qwen_image", "hunyuan_video", *CROSS_FAMILIES)
SIZE = (10, 13)
"""Height and width of the latents: the width is no multiple of the patch."""


def tokens(width: int, seed: int = 0, rows: int = 3, **options: Any) -> GuidelineTokens:
    return GuidelineTokens(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), **options)


@pytest.fixture
def reading(host: Any) -> Any:
    """Return a correction that only reads maps, and how to attach it."""
    from safe_guidance.nodes.host.attention import families, map_collector
    from safe_guidance.nodes.host.engine import hooks

    class Reader(hooks.Correction):
        def __init__(self, *concepts: GuidelineTokens) -> None:
            self.concepts = concepts
            self.seen: list[list[torch.Tensor] | None] = []

        def patch(self, model: Any) -> None:
            families.listen_for_maps(model, self.concepts, lambda run: run.state_of(self))

        def begin(self, context: Any) -> Any:
            return map_collector.MapCollector(self.concepts)

        def is_active(self, level: Any) -> bool:
            return True

        def correct(self, step: Any, state: Any) -> None:
            self.seen.append(state.take(step))

    return SimpleNamespace(Reader=Reader, attach=hooks.attach, text_width=families.text_width)


def small_model(tiny: Any, family: str) -> Any:
    import tiny_transformers

    return tiny.tiny_model(family) if family in FAMILIES else tiny_transformers.tiny_transformer(family)


def noise_for(tiny: Any, model: Any, batch: int, frames: int = 1, seed: int = 0) -> torch.Tensor:
    """Return noise with a frame dimension if the model's latents have one."""
    is_video = model.get_model_object("latent_format").latent_dimensions == 3
    dims = (frames,) if is_video else ()
    width = SIZE[1] - is_video  # HunyuanVideo takes no width that is no multiple of its patch
    shape = (batch, tiny.latent_channels(model), *dims, SIZE[0], width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(
    tiny: Any,
    model: Any,
    batch: int = 1,
    steps: int = 1,
    cfg: float = 3.0,
    positive: Any = None,
    frames: int = 1,
) -> torch.Tensor:
    import comfy.sample

    noise = noise_for(tiny, model, batch, frames)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        "euler",
        "normal",
        positive or tiny.tiny_conditioning(1, batch),
        tiny.tiny_conditioning(2),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=1,
    )


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_watching_changes_no_bit_and_gives_maps(host: Any, reading: Any, tiny: Any, family: str) -> None:
    model = small_model(tiny, family)
    size = tuple(noise_for(tiny, model, 1).shape[-2:])
    width = reading.text_width(model)
    reader = reading.Reader(tokens(width), tokens(width, 1, rows=2))
    found = sample(tiny, reading.attach(model, reader), batch=2, steps=2)
    assert torch.equal(found, sample(tiny, model, batch=2, steps=2))
    assert len(reader.seen) == 2
    for maps in reader.seen:
        assert maps is not None and [m.shape for m in maps] == [(2, 3, *size), (2, 2, *size)]
        for of_concept in maps:
            torch.testing.assert_close(of_concept.sum(1), torch.ones(2, *size))
            assert of_concept.std() > 1e-4
    first, second = reader.seen[0][0]
    assert not torch.equal(first, second)


def published(embeddings: torch.Tensor, found: list[torch.Tensor]) -> Callable[[Any], Any]:
    """Return a patch that runs Flux's blocks twice with the whole image, as the paper's code does."""
    state: dict[str, torch.Tensor] = {}

    def block(index: int, network: Any) -> Any:
        def replace(args: Any, extra: Any) -> Any:
            seen = {}

            def noting(name: str) -> Any:
                def attention(function: Any, *inputs: Any, **options: Any) -> torch.Tensor:
                    seen[name] = function(*inputs, **options)
                    return seen[name]

                return attention

            count, text, options = len(embeddings), args["txt"].shape[1], args["transformer_options"]
            rows = embeddings.expand(len(args["img"]), -1, -1)
            stream = network.txt_in(rows) if index == 0 else state["stream"]
            pe = torch.cat([args["pe"][:, :, :count], args["pe"][:, :, text:]], 2)
            own = {**args, "img": args["img"].clone(), "txt": stream.clone(), "pe": pe}
            own["transformer_options"] = {**options, "optimized_attention_override": noting("concepts")}
            state["stream"] = extra["original_block"](own)["txt"]
            options = {**options, "optimized_attention_override": noting("image")}
            out = extra["original_block"]({**args, "transformer_options": options})
            scores = seen["concepts"][:, :count] @ seen["image"][:, text:].transpose(1, 2)
            if index == 1:
                found.append(scores.softmax(1))
            return out

        return replace

    def patch(model: Any) -> Any:
        patched = model.clone()
        for index in range(2):
            patched.set_model_patch_replace(
                block(index, model.model.diffusion_model), "dit", "double_block", index
            )
        return patched

    return patch


def test_maps_equal_those_of_running_the_blocks_with_the_whole_image(
    host: Any, reading: Any, tiny: Any
) -> None:
    model, concept = tiny.tiny_model("flux"), tokens(tiny.WIDTH, layers=("double.1",))
    found: list[torch.Tensor] = []
    sample(tiny, published(concept.embeddings, found)(model), batch=2)
    reader = reading.Reader(concept)
    sample(tiny, reading.attach(model, reader), batch=2)
    small = found[0][2:].unflatten(-1, (5, 7))  # the host puts the negative branch first
    expected = torch.nn.functional.interpolate(small, size=SIZE, mode="bilinear", align_corners=False)
    assert reader.seen[0] is not None
    torch.testing.assert_close(reader.seen[0][0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", ["reader", "other"])
def test_another_packs_replacement_of_a_block_works_too(
    host: Any, reading: Any, tiny: Any, family: str, first: str
) -> None:
    calls: list[int] = []

    def scaled(args: Any, extra: Any) -> Any:
        calls.append(1)
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.1}

    def with_other(model: Any) -> Any:
        patched = model.clone()
        patched.set_model_patch_replace(scaled, "dit", "double_block", 0)
        return patched

    model = tiny.tiny_model(family)
    reader, alone = (reading.Reader(tokens(reading.text_width(model))) for _ in range(2))
    baseline = sample(tiny, with_other(model))
    assert not torch.equal(baseline, sample(tiny, model))
    count = len(calls)
    if first == "reader":
        both = with_other(reading.attach(model, reader))
    else:
        both = reading.attach(with_other(model), reader)
    assert torch.equal(sample(tiny, both), baseline) and len(calls) == 2 * count
    sample(tiny, reading.attach(model, alone))
    assert reader.seen[0] is not None and not torch.equal(reader.seen[0][0], alone.seen[0][0])


def test_a_skipped_block_is_skipped_for_the_concepts(host: Any, reading: Any, tiny: Any) -> None:
    model = tiny.tiny_model("flux").clone()
    model.set_model_patch_replace(
        lambda args, extra: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 1
    )
    reader = reading.Reader(tokens(tiny.WIDTH))
    assert torch.equal(sample(tiny, reading.attach(model, reader)), sample(tiny, model))
    assert reader.seen == [None]


def test_another_packs_attention_works_too(host: Any, reading: Any, tiny: Any) -> None:
    model = tiny.tiny_model("flux").clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda function, q, k, v, heads, **options: 0.5 * function(q, k, v, heads, **options)
    )
    reader = reading.Reader(tokens(tiny.WIDTH))
    baseline = sample(tiny, model)
    assert torch.equal(sample(tiny, reading.attach(model, reader)), baseline)
    assert reader.seen[0] is not None
    assert not torch.equal(baseline, sample(tiny, tiny.tiny_model("flux")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_has_the_map_that_it_has_alone(
    host: Any, reading: Any, tiny: Any, family: str
) -> None:
    import comfy.sample

    model = tiny.tiny_model(family)
    both, alone = (reading.Reader(tokens(reading.text_width(model))) for _ in range(2))
    noise = torch.randn(2, 16, *SIZE, generator=torch.Generator().manual_seed(0))
    ((embedding, options),) = tiny.tiny_conditioning(1, 2)
    second = [[embedding[1:], {"pooled_output": options["pooled_output"][1:]}]]
    for reader, rows, positive in ((both, noise, [[embedding, options]]), (alone, noise[1:], second)):
        comfy.sample.sample(
            reading.attach(model, reader),
            rows,
            1,
            3.0,
            "euler",
            "normal",
            positive,
            tiny.tiny_conditioning(2),
            torch.zeros_like(rows),
            disable_pbar=True,
            seed=1,
        )
    assert both.seen[0] is not None and alone.seen[0] is not None
    torch.testing.assert_close(both.seen[0][0][1:], alone.seen[0][0], atol=1e-4, rtol=1e-3)


def test_concepts_do_not_change_each_others_maps(host: Any, reading: Any, tiny: Any) -> None:
    model = tiny.tiny_model("flux")
    both, alone = (
        reading.Reader(tokens(tiny.WIDTH), tokens(tiny.WIDTH, 1)),
        reading.Reader(tokens(tiny.WIDTH)),
    )
    sample(tiny, reading.attach(model, both))
    sample(tiny, reading.attach(model, alone))
    assert both.seen[0] is not None and alone.seen[0] is not None
    assert torch.equal(both.seen[0][0], alone.seen[0][0])


def test_tokens_of_another_family_raise_an_error(host: Any, tiny: Any) -> None:
    model = tiny.tiny_model("flux")
    with pytest.raises(ValueError, match="were made for TinySD3, the model is TinyFlux"):
        guarded(model, tokens(tiny.WIDTH, family="TinySD3"), tiny.tiny_conditioning(3))
    with pytest.raises(ValueError, match="read layers that this model does not have"):
        guarded(model, tokens(tiny.WIDTH, layers=("output.3.0",)), tiny.tiny_conditioning(3))


def guarded(model: Any, concept: GuidelineTokens, safety: Any, **inputs: Any) -> Any:
    """Return the model with DAG Detector + Guide at its defaults, except for the given settings."""
    from safe_guidance.nodes.detect_and_guide import DAGDetectorGuideNode

    defaults = {
        i.id: i.default
        for i in DAGDetectorGuideNode.define_schema().inputs
        if getattr(i, "default", None) is not None
    }
    result = DAGDetectorGuideNode.execute(
        model=model, guideline_tokens=concept, safety=safety, **{**defaults, **inputs}
    )
    return result.args[0]


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_guidance_acts_only_in_the_mask(host: Any, reading: Any, tiny: Any, family: str) -> None:
    model = small_model(tiny, family)
    always = tokens(reading.text_width(model), rows=2, calibration=MapCalibration(0.011))
    never = tokens(reading.text_width(model), rows=2, calibration=MapCalibration(0.989))
    safety = tiny.tiny_conditioning(3)
    eager = {"coverage": 1.01, "start_sigma": 1000.0}
    plain = sample(tiny, model, steps=2)
    found = sample(tiny, guarded(model, always, safety, **eager), steps=2)
    assert torch.isfinite(found).all() and not torch.equal(found, plain)
    left = torch.zeros(1, *SIZE)
    left[..., :6] = 1
    looked = sample(tiny, guarded(model, always, safety, mask=left, look_first=True, **eager), steps=2)
    assert torch.equal(looked[..., 6:], plain[..., 6:])
    assert not torch.equal(looked[..., :6], plain[..., :6])
    for concept, settings in ((never, {}), (always, {"strength": 0.0}), (always, {"start_sigma": 0.001})):
        assert torch.equal(sample(tiny, guarded(model, concept, safety, **settings), steps=2), plain)


@pytest.mark.parametrize("family", CROSS_FAMILIES)
def test_cross_attention_of_a_transformer_is_that_of_its_own_layers(
    host: Any, reading: Any, tiny: Any, family: str
) -> None:
    """The text is as long as the image here: 30 tokens. The expected maps are plain loops in float64."""
    model, concept = small_model(tiny, family), tokens(tiny.WIDTH)
    blocks = model.model.diffusion_model.blocks
    seen: list[torch.Tensor] = []
    name, heads = ("norm_q", "num_heads") if family == "wan" else ("q_norm", "n_heads")
    handles = [
        getattr(block.cross_attn, name).register_forward_hook(lambda m, i, out: seen.append(out.clone()))
        for block in blocks
    ]
    positive = [[tiny.tiny_conditioning(1)[0][0][:, :30], {}]]
    try:
        sample(tiny, model, positive=positive, cfg=1.0)
    finally:
        for handle in handles:
            handle.remove()
    expected = []
    for block, queries in zip(blocks, seen):
        attention, rows = block.cross_attn, concept.embeddings[None]
        if family == "wan":
            keys = attention.norm_k(attention.k(model.model.diffusion_model.text_embedding(rows)))
        else:
            keys = attention.k_norm(attention.k_proj(rows).unflatten(-1, (attention.n_heads, -1)))
        count = getattr(attention, heads)
        q, k = (t.double().reshape(t[0].numel() // 96, count, -1) for t in (queries, keys))
        scores = [(q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5).softmax(-1) for h in range(count)]
        expected.append(torch.stack(scores).mean(0).T.reshape(1, 3, 5, 6))
    mean = torch.stack(expected).mean(0)
    mean = torch.nn.functional.interpolate(mean, size=(10, 12), mode="bilinear", align_corners=False)
    reader = reading.Reader(concept)
    sample(tiny, reading.attach(model, reader), positive=positive, cfg=1.0)
    assert reader.seen[0] is not None
    torch.testing.assert_close(reader.seen[0][0].double(), mean, atol=1e-5, rtol=1e-4)


def test_every_frame_of_a_video_has_its_own_map(host: Any, reading: Any, tiny: Any) -> None:
    model = small_model(tiny, "hunyuan_video")
    reader = reading.Reader(tokens(tiny.WIDTH))
    clips = {"batch": 2, "frames": 3, "steps": 2}
    plain = sample(tiny, model, **clips)
    assert torch.equal(sample(tiny, reading.attach(model, reader), **clips), plain)
    assert reader.seen[0] is not None and reader.seen[0][0].shape == (6, 3, 10, 12)
    assert len({float(of_frame.sum()) for of_frame in reader.seen[0][0][:, 0]}) == 6
    always = tokens(tiny.WIDTH, rows=2, calibration=MapCalibration(0.011))
    left = torch.zeros(1, 10, 12)
    left[..., :6] = 1
    safety = tiny.tiny_conditioning(3)
    settings = {"coverage": 1.01, "start_sigma": 1000.0, "mask": left, "look_first": True}
    found = sample(tiny, guarded(model, always, safety, **settings), **clips)
    assert torch.equal(found[..., 6:], plain[..., 6:])
    assert all(not torch.equal(found[:, :, t, :, :6], plain[:, :, t, :, :6]) for t in range(3))


def test_regional_prompts_have_their_maps_at_their_places(host: Any, reading: Any, tiny: Any) -> None:
    """With a frame dimension too. The right half has a prompt of its own."""
    for family in ("flux", "qwen_image"):
        model = small_model(tiny, family)
        height, width = noise_for(tiny, model, 1).shape[-2:]
        (first, options), (second, _) = tiny.tiny_conditioning(1)[0], tiny.tiny_conditioning(4)[0]
        areas = [(first, 0, 6), (second, 6, width - 6)]
        positive = [[text, {**options, "area": (height, w, 0, x), "strength": 1.0}] for text, x, w in areas]
        reader, mirrored = reading.Reader(tokens(tiny.WIDTH)), reading.Reader(tokens(tiny.WIDTH))
        plain = sample(tiny, model, positive=positive)
        assert torch.equal(sample(tiny, reading.attach(model, reader), positive=positive), plain)
        sample(tiny, reading.attach(model, mirrored), positive=positive[:1])
        assert reader.seen[0] is not None and reader.seen[0][0].shape == (1, 3, height, width)
        torch.testing.assert_close(reader.seen[0][0].sum(1), torch.ones(1, height, width))
        assert mirrored.seen == [None] or not torch.equal(mirrored.seen[0][0], reader.seen[0][0])


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "cosmos_predict2"])
def test_the_detection_map_node_shows_maps_of_all_families(
    host: Any, reading: Any, tiny: Any, family: str
) -> None:
    import tiny_transformers

    from safe_guidance.nodes.detect_and_guide import DAGDetectionMapNode

    model = small_model(tiny, family)
    latents = noise_for(tiny, model, 2, seed=1)
    concept = tokens(reading.text_width(model), family=type(model.model.model_config).__name__)
    DAGDetectionMapNode.hidden = None
    mask, sheet, report = DAGDetectionMapNode.execute(
        model=model,
        vae=tiny.tiny_vae(16) if latents.ndim == 4 else tiny_transformers.tiny_video_vae(),
        guideline_tokens=concept,
        positive=tiny.tiny_conditioning(1),
        samples={"samples": latents},
        sigmas="5, 1",
        seed=0,
    ).args
    assert (
        mask.shape == (2, 8 * latents.shape[-2], 8 * latents.shape[-1])
        and sheet.shape[0] == 2
        and 0 <= mask.min() < mask.max() <= 1
    )
    assert "sigma 5:" in report and "sigma 1:" in report


def test_words_become_tokens_of_the_encoder_that_the_model_reads(host: Any, tiny: Any) -> None:
    """Flux reads T5's embeddings alone, SD 3 those of CLIP before T5's; T5 has no start token."""
    from safe_guidance.nodes.guideline_tokens import GuidelineTokensFromTextNode

    for family, before in (("flux", 0), ("sd3", 77)):
        clip = tiny.tiny_clip(family)

        def hidden(text: str, clip: Any = clip) -> torch.Tensor:
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0][0].float()

        words = "nude person"
        whole = GuidelineTokensFromTextNode.execute(clip=clip, words=words, whole_phrase=True).args[0]
        last = GuidelineTokensFromTextNode.execute(clip=clip, words=words).args[0]
        pieces = [piece[0] for piece in clip.tokenize(words)["t5xxl"][0]].index(1)  # T5's end token
        assert pieces >= 2
        assert torch.equal(whole.embeddings[1:], hidden(words)[before : before + pieces])
        assert torch.equal(last.embeddings[1:], whole.embeddings[-1:])
        assert torch.equal(last.embeddings[0], hidden("background")[before])


def test_recorded_attention_gives_the_maps_of_the_ordinary_forward(host: Any, tiny: Any) -> None:
    from safe_guidance.guidance.detect_and_guide.attention_maps import normalize_jointly
    from safe_guidance.nodes.host.attention.detection_maps import detect
    from safe_guidance.nodes.host.attention.joint_recording import record_jointly

    for family in ("flux", "chroma"):
        model, concept = small_model(tiny, family), tokens(tiny.WIDTH, rows=2)
        latents = noise_for(tiny, model, 1)
        inputs = (tiny.tiny_conditioning(1), latents, (2.0, 1.0), 3)
        expected = detect(model, concept, *inputs)
        recording = record_jointly(model, latents, inputs[0], inputs[2], 3)
        for level in range(2):
            found = normalize_jointly(recording.probabilities(concept.embeddings, level))
            torch.testing.assert_close(found[:, 0], expected[:, level], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["flux", "hunyuan_video"])
def test_tokens_are_learnt_on_joint_attention(host: Any, tiny: Any, family: str) -> None:
    """The left half of every image is the concept. Random weights: the loss falls, and no more is asked."""
    import tiny_transformers

    from safe_guidance.nodes.guideline_token_learning import OptimizeGuidelineTokensNode

    model = small_model(tiny, family)
    images = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 64, 64)
    masks[..., :32] = 1
    images[:2, :, :32] *= 0.2
    learnt, _, _, report = OptimizeGuidelineTokensNode.execute(
        model=model,
        clip=tiny.tiny_clip("flux"),
        vae=tiny.tiny_vae(16) if family == "flux" else tiny_transformers.tiny_video_vae(),
        images=images[:2],
        masks=masks,
        safe_images=images[2:],
        words="star",
        tokens=1,
        recipe="contrast",
        seed=0,
        iterations=20,
        sigmas="1",
        levels=1,
    ).args
    assert learnt.family == type(model.model.model_config).__name__ and learnt.layers == ("double.1",)
    assert not learnt.embeddings.is_inference() and torch.isfinite(learnt.embeddings).all()
    first, best = (float(report.split(word)[1].split()[0].strip(",")) for word in ("loss", "best"))
    assert best < 0.9 * first
    assert not any(p.requires_grad and p.grad is not None for p in model.model.parameters())
    with pytest.raises(ValueError, match=f"were made for {learnt.family}, the model is TinySD3"):
        other = tokens(tiny.WIDTH, family=learnt.family)
        guarded(tiny.tiny_model("sd3"), other, tiny.tiny_conditioning(3))


def test_cfg_1_is_said_and_costs_the_negative_only_where_something_is_found(
    host: Any, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    safety = tiny.tiny_conditioning(3)
    rows = {}
    for threshold in (0.011, 0.989):
        concept = tokens(tiny.WIDTH, rows=2, calibration=MapCalibration(threshold))
        model = guarded(tiny.tiny_model("flux"), concept, safety, coverage=1.01, start_sigma=1000.0)
        counted, rows[threshold] = host.count_calls(model)
        sample(tiny, counted, steps=2, cfg=1.0)
    # The first step is at infinite noise, outside of every window.
    assert rows == {0.011: [1, 1, 2], 0.989: [1, 1]}
    assert "CFG is 1, so the negative prompt is evaluated for DAG alone" in caplog.text
