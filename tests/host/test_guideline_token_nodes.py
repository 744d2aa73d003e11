"""Nodes that make, learn, keep and show guideline tokens, in the real host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from demo_prompts import STAR
from safe_guidance.guidance.detect_and_guide.guideline_tokens import GuidelineTokens, MapCalibration

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


def annotated(count: int = 3) -> tuple[Any, ...]:
    from safe_guidance.nodes.demo_annotated_set import DemoAnnotatedSetNode

    return DemoAnnotatedSetNode.execute(count=count, seed=5).args


def optimised(host: Any, count: int = 3, **inputs: Any) -> Any:
    from safe_guidance.nodes.guideline_token_learning import OptimizeGuidelineTokensNode

    images, masks, safe, captions = annotated(count)
    given = {
        "images": images,
        "masks": masks,
        "safe_images": safe,
        "captions": captions,
        "words": "star",
        "tokens": 1,
    }
    fixed = {
        "recipe": "contrast",
        "seed": 1,
        "iterations": 40,
        "sigmas": "3, 1",
        "scales": "1/2",
        "levels": 2,
    }
    return OptimizeGuidelineTokensNode.execute(
        model=host.model, clip=host.clip, vae=host.vae, **{**given, **fixed, **inputs}
    ).args


def test_the_demo_set_has_masks_of_its_stars(host: Any) -> None:
    images, masks, safe, captions = annotated(4)
    assert images.shape == safe.shape == (4, 128, 128, 3) and masks.shape == (4, 128, 128)
    assert masks.flatten(1).mean(1).min() > 0.01 and masks.flatten(1).mean(1).max() < 0.3
    assert len(captions.split("\n")) == 8
    assert all(torch.equal(a, b) for a, b in zip(annotated(4)[:3], (images, masks, safe)))


def test_tokens_learn_progress_and_repeat(host: Any) -> None:
    import comfy.utils

    seen: list[tuple[int, int, Any]] = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: seen.append((value, total, preview))
    )
    try:
        tokens, curve, overlap, report = optimised(host)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert (
        tokens.family == "DemoModelConfig" and tokens.embeddings.shape == (2, 96) and tokens.words == "star"
    )
    assert tokens.sigmas == (3.0, 1.0) and tokens.layers == ("input.3.0", "output.2.0", "output.3.0")
    assert curve.shape == (1, 256, 512, 3) and "loss" in report and overlap == 0.0 and tokens.iou is None
    assert not tokens.embeddings.is_inference() and not tokens.embeddings.requires_grad
    assert (40, 40) in [entry[:2] for entry in seen] and any(preview is not None for *_, preview in seen)
    again = optimised(host)[0]
    assert torch.equal(again.embeddings, tokens.embeddings)
    assert not torch.equal(optimised(host, seed=2)[0].embeddings, tokens.embeddings)


def test_enough_images_are_split_and_the_held_out_overlap_reported(host: Any) -> None:
    tokens, _, overlap, report = optimised(host, count=4, tokens=3)
    assert tokens.iou is not None and overlap == tokens.iou and 0 <= overlap <= 1
    assert "6 images learnt from" in report and "2 held-out images" in report
    assert tokens.embeddings.shape == (4, 96)


def test_every_fourth_image_of_either_kind_is_held_out() -> None:
    from safe_guidance.nodes.host.attention.token_learning import held_out

    masks = torch.zeros(12, 2, 2, dtype=torch.bool)
    masks[:8, 0, 0] = True
    assert held_out(masks) == [3, 7, 11]
    assert held_out(masks[:7]) == []


def test_learning_can_be_interrupted(host: Any) -> None:
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    try:
        with pytest.raises(management.InterruptProcessingException):
            optimised(host)
    finally:
        management.interrupt_current_processing(False)
    assert isinstance(optimised(host)[0], GuidelineTokens)


def test_the_cache_is_what_the_detector_hears_while_sampling(host: Any) -> None:
    """The cached maps equal those of an ordinary run at the noise from which the sampler starts."""
    import comfy.sample

    from safe_guidance.nodes.host.attention.given_images import record_latents

    tokens = GuidelineTokens(torch.randn(2, 96, generator=torch.Generator().manual_seed(2)))
    latents = host.sample(host.model, host.text(STAR), steps=3)
    cache = record_latents(
        host.model, latents, torch.zeros(1, 128, 128), host.text(STAR), (2.0,), (2, 4), seed=9
    )
    raw: list[torch.Tensor] = []
    from safe_guidance.nodes.host.attention.capture import attention_layer

    layer = attention_layer(host.model.model.diffusion_model, "output.3.0")
    handle = layer.to_q.register_forward_hook(lambda module, inputs, output: raw.append(output.clone()))
    try:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
        comfy.sample.sample_custom(
            host.model,
            noise,
            1.0,
            _once(),
            torch.tensor([2.0, 0.0]),
            host.text(STAR),
            host.text(""),
            latents,
            disable_pbar=True,
        )
    finally:
        handle.remove()
    index = cache.layers.index("output.3.0")
    queries = cache.queries[0][index]
    expected = raw[0].unflatten(-1, (layer.heads, -1)).transpose(1, 2).half()
    torch.testing.assert_close(queries, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(cache.key_weights[index], layer.to_k.weight.float())
    assert cache.maps(tokens.embeddings, 0).shape == (1, 2, 32, 32)


STARS = (
    "a yellow star in the center on a black plain background",
    "a red star on the left on a black plain background, flat style",
)
CIRCLE = "a green circle on the right on a white plain background"


def recorded(host: Any, **inputs: Any) -> Any:
    from safe_guidance.nodes.sample_and_record import SampleAndRecordAttentionNode

    given = {
        "prompts": "\n".join(STARS),
        "safe_prompts": f"\n{CIRCLE}\n\n",
        "seed": 7,
        "steps": 4,
        "cfg": 3.0,
    }
    fixed = {"sampler_name": "dpmpp_2m", "scheduler": "karras", "sigmas": "5, 4.8, 0.8", "scales": "1/2"}
    latent = {"samples": torch.zeros(2, 4, 32, 32)}
    sockets = {
        "model": host.model,
        "clip": host.clip,
        "vae": host.vae,
        "negative": host.text(""),
        "latent_image": latent,
    }
    return SampleAndRecordAttentionNode.execute(**{**sockets, **given, **fixed, **inputs}).args


def test_recorded_images_are_the_ksamplers_own_by_prompt_and_seed(host: Any) -> None:
    from safe_guidance.nodes.host.engine.ksampler import sample

    images, safe, attention = recorded(host, seeds="11, 3")
    assert images.shape == (2, 128, 128, 3) and safe.shape == (1, 128, 128, 3) and len(attention) == 3
    for image, prompt, seed in zip([*images, *safe], [*STARS, CIRCLE], (11, 3, 4)):
        empty = {"samples": torch.zeros(1, 4, 32, 32)}
        latent = sample(
            host.model, seed, 4, 3.0, "dpmpp_2m", "karras", host.text(prompt), host.text(""), empty, 1.0
        )
        assert torch.equal(image, host.vae.decode(latent["samples"])[0])
    assert recorded(host, safe_prompts="")[1].shape == (0, 128, 128, 3)


def test_recorded_attention_is_what_the_layers_asked_at_the_nearest_steps(host: Any) -> None:
    """The queries equal those of a hook on the raw layer in an ordinary run; the host decides which
    rows are the prompt's.
    """
    import comfy.samplers

    from safe_guidance.nodes.host.attention.capture import attention_layer

    attention = recorded(host)[2]
    schedule = comfy.samplers.KSampler(
        host.model, 4, host.model.load_device, "dpmpp_2m", "karras", 1.0
    ).sigmas.tolist()
    steps = [schedule.index(pytest.approx(sigma)) for sigma in attention.sigmas]
    assert (
        len(attention.sigmas) == 2
        and attention.sigmas[0] > attention.sigmas[1]
        and not bool(attention.masks.any())
    )
    raw: list[torch.Tensor] = []
    layer = attention_layer(host.model.model.diffusion_model, "output.3.0")
    handle = layer.to_q.register_forward_hook(lambda module, inputs, output: raw.append(output.clone()))
    try:
        recorded(host, prompts=STARS[1], safe_prompts="", seed=8)
    finally:
        handle.remove()
    index = attention.layers.index("output.3.0")
    # The recorder's own projection, in the correction after the forward, is heard by the hook too: of one
    # row, not of two.
    forwards = [output for output in raw if len(output) == 2]
    assert len(forwards) == 4
    for level, step in enumerate(steps):
        asked = attention.queries[level][index][1].transpose(0, 1).flatten(1).float()
        off = [(row.float() - asked).abs().max().item() for row in forwards[step]]
        assert min(off) < 1e-2 * asked.abs().max().item() < max(off)


def test_tokens_learn_from_recorded_attention_and_repeat(host: Any) -> None:
    images, safe, attention = recorded(host)
    masks = torch.zeros(2, 128, 128)
    masks[:, 40:80, 40:80] = 1
    given = {
        "images": images,
        "masks": masks,
        "safe_images": safe,
        "attention": attention,
        "captions": "not used",
    }
    tokens, _, _, report = optimised(host, **given)
    assert (
        tokens.sigmas == attention.sigmas
        and tokens.layers == attention.layers
        and "3 images learnt from" in report
    )
    again = optimised(host, **{**given, "attention": recorded(host)[2]})[0]
    assert torch.equal(again.embeddings, tokens.embeddings)
    assert not torch.equal(
        optimised(host, **{**given, "attention": recorded(host, seed=8)[2]})[0].embeddings, tokens.embeddings
    )
    with pytest.raises(ValueError, match="recorded for 3 images, but 2 are connected"):
        optimised(host, **{**given, "safe_images": None})
    narrow = replace(attention, key_weights=tuple(w[:, :48] for w in attention.key_weights))
    with pytest.raises(ValueError, match="recorded with a model of another family"):
        optimised(host, **{**given, "attention": narrow})


def test_a_model_that_looks_first_is_recorded_in_the_run_that_makes_the_image(host: Any) -> None:
    """A two-pass model samples twice; the attention of the second, guided pass is recorded."""
    from safe_guidance.nodes.detect_and_guide import DAGDetectorGuideNode
    from safe_guidance.nodes.host.engine.ksampler import sample

    found = GuidelineTokens(
        torch.randn(2, 96, generator=torch.Generator().manual_seed(2)), calibration=MapCalibration(0.011)
    )
    defaults = {
        i.id: i.default
        for i in DAGDetectorGuideNode.define_schema().inputs
        if getattr(i, "default", None) is not None
    }
    inputs = {**defaults, "look_first": True, "start_sigma": 1000.0, "coverage": 1.01}
    guarded = DAGDetectorGuideNode.execute(
        model=host.model, guideline_tokens=found, safety=host.text("a star"), **inputs
    ).args[0]
    images, _, attention = recorded(host, model=guarded, prompts=STARS[0], safe_prompts="")
    empty = {"samples": torch.zeros(1, 4, 32, 32)}
    latent = sample(guarded, 7, 4, 3.0, "dpmpp_2m", "karras", host.text(STARS[0]), host.text(""), empty, 1.0)
    assert torch.equal(images, host.vae.decode(latent["samples"]))
    plain = recorded(host, prompts=STARS[0], safe_prompts="")[2]
    assert attention.sigmas == plain.sigmas and len(attention.queries) == len(plain.queries)
    assert not torch.equal(attention.queries[-1][0], plain.queries[-1][0])


def test_recording_shows_progress_over_all_images_and_can_be_interrupted(host: Any) -> None:
    import comfy.model_management as management
    import comfy.utils

    seen: list[tuple[int, int]] = []

    def stop_after_the_first_image(value: int, total: int, preview: Any, node_id: Any = None) -> None:
        seen.append((value, total))
        if value > 4:
            management.interrupt_current_processing(True)
        management.throw_exception_if_processing_interrupted()

    comfy.utils.set_progress_bar_global_hook(stop_after_the_first_image)
    try:
        with pytest.raises(management.InterruptProcessingException):
            recorded(host)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        management.interrupt_current_processing(False)
    values = [value for value, total in seen if total == 12]
    # The host leaves out updates that follow each other too fast.
    assert len(values) == len(seen) and values == sorted(set(values)) and 4 < values[-1] < 12


def test_every_sampler_is_recorded_or_says_that_it_cannot_be(host: Any) -> None:
    from safe_guidance.nodes.host.engine.ksampler import SAMPLERS

    refused = set()
    for sampler_name in SAMPLERS:
        try:
            attention = recorded(host, prompts=STARS[0], safe_prompts="", sampler_name=sampler_name)[2]
            assert len(attention.queries) == len(attention.sigmas) == 2
        except ValueError as error:
            assert "chooses its own noise levels" in str(error)
            refused.add(sampler_name)
    assert refused <= {"dpm_adaptive", "dpm_fast"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": " \n"}, "There is no prompt"),
        ({"prompts": "star\n" * 513}, "There are 514 prompts"),
        ({"seeds": "1, two"}, "is not a list of seeds"),
        ({"seeds": "-1"}, "is not a list of seeds"),
        ({"sigmas": "0"}, "is not a list of noise levels"),
        (
            {"scales": "1 and 1/2", "latent_image": {"samples": torch.zeros(1, 4, 32, 32)}, "clip": None},
            "There is no CLIP",
        ),
    ],
    ids=["no prompt", "too many", "words for numbers", "negative", "no noise", "no text encoder"],
)
def test_recordings_that_cannot_be_made_are_explained(
    host: Any, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        recorded(host, **change)


def test_seeds_count_on_from_the_last_given_one() -> None:
    from safe_guidance.nodes.parsing import seeds_of

    assert (
        seeds_of("", 5, 3) == [5, 6, 7]
        and seeds_of("9; 2", 5, 4) == [9, 2, 3, 4]
        and seeds_of("1, 2, 3", 5, 2) == [1, 2]
    )
    assert seeds_of("", 2**64 - 1, 2) == [2**64 - 1, 0]


def test_texts_of_different_lengths_are_one_conditioning_that_means_the_same(host: Any) -> None:
    """The prediction of each row of the batch equals that of the row's own text alone."""
    from safe_guidance.nodes.host.engine.conditioning import encode_each

    long = " ".join([STARS[0]] * 9)
    texts = [STARS[0], long]
    assert host.text(STARS[0])[0][0].shape[1] < host.text(long)[0][0].shape[1]
    x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(4))
    together = _predicted(host, x, encode_each(host.clip, texts))
    alone = torch.cat([_predicted(host, x[i : i + 1], host.text(text)) for i, text in enumerate(texts)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert (together[0] - _predicted(host, x[:1], host.text(long))[0]).abs().max() > 1e-3
    assert isinstance(optimised(host, captions="\n".join([long, STARS[0]]))[0], GuidelineTokens)


def test_pooled_texts_belong_to_their_images(host: Any, tiny: Any) -> None:
    """SDXL reads a pooled output beside the embedding: each text has its own row, also in the second
    batch.
    """
    from safe_guidance.nodes.host.attention.given_images import BATCH, record_latents
    from safe_guidance.nodes.host.engine.conditioning import encode, encode_each

    clip = tiny.tiny_clip("sdxl")
    ((_, options),) = encode_each(clip, ["a star", "a heart"])
    alone = [encode(clip, text)[0][1]["pooled_output"] for text in ("a star", "a heart")]
    torch.testing.assert_close(options["pooled_output"], torch.cat(alone))
    assert not torch.equal(*alone)

    model, count = tiny.tiny_model("sdxl"), BATCH + 2
    ((embeddings, pooled),) = tiny.tiny_conditioning(1, count)
    pooled = pooled["pooled_output"]
    latents = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def asked(first: int, pooled: torch.Tensor) -> torch.Tensor:
        rows, masks = slice(first, count), torch.zeros(count - first, 16, 16)
        conditioning = [[embeddings[rows], {"pooled_output": pooled[rows]}]]
        return record_latents(
            model, latents[rows], masks, conditioning, (2.0,), (2,), seed=5 + first
        ).queries[0][0]

    assert torch.equal(asked(0, pooled)[BATCH:], asked(BATCH, pooled))
    assert not torch.equal(asked(0, pooled)[BATCH:], asked(BATCH, pooled.flip(0)))


def _predicted(host: Any, x: torch.Tensor, conditioning: Any) -> torch.Tensor:
    """Return the denoised prediction at sigma 2, from one step down to zero."""
    import comfy.sample

    zeros = torch.zeros_like(x)
    return comfy.sample.sample_custom(
        host.model,
        x,
        1.0,
        _once(),
        torch.tensor([2.0, 0.0]),
        conditioning,
        conditioning,
        zeros,
        disable_pbar=True,
    )


def _once() -> Any:
    import comfy.samplers

    return comfy.samplers.sampler_object("euler")


def test_tokens_from_text_are_the_encoders_own(host: Any) -> None:
    from safe_guidance.nodes.guideline_tokens import GuidelineTokensFromTextNode

    hidden = host.text("a yellow star")[0][0][0]
    last = GuidelineTokensFromTextNode.execute(clip=host.clip, words="a yellow star").args[0]
    whole = GuidelineTokensFromTextNode.execute(
        clip=host.clip, words="a yellow star", whole_phrase=True
    ).args[0]
    assert torch.equal(last.embeddings, hidden[[0, 3]]) and torch.equal(whole.embeddings, hidden[:4])
    with pytest.raises(ValueError, match="The phrase has no words"):
        GuidelineTokensFromTextNode.execute(clip=host.clip, words="")
    with pytest.raises(ValueError, match="There is no CLIP"):
        GuidelineTokensFromTextNode.execute(clip=None, words="star")


def test_saved_tokens_are_found_and_loaded(host: Any) -> None:
    from safe_guidance.nodes.guideline_tokens import (
        GuidelineTokensFromTextNode,
        LoadGuidelineTokensNode,
        SaveGuidelineTokensNode,
    )

    tokens = GuidelineTokensFromTextNode.execute(clip=host.clip, words="star").args[0]
    name = SaveGuidelineTokensNode.execute(guideline_tokens=tokens, name="tests/star", licence="CC0").args[0]
    assert name == "tests/star.safetensors"
    loaded = LoadGuidelineTokensNode.execute(name=name).args[0]
    assert torch.equal(loaded.embeddings, tokens.embeddings) and loaded.licence == "CC0"
    assert (
        SaveGuidelineTokensNode.execute(guideline_tokens=tokens, name="tests/star").args[0]
        == "tests/star_002.safetensors"
    )
    for bad in ("../star", "a\\b", ""):
        with pytest.raises(ValueError, match="cannot have the name|leads out"):
            SaveGuidelineTokensNode.execute(guideline_tokens=tokens, name=bad)


def test_detection_maps_have_a_row_per_image_and_a_map_per_level(host: Any) -> None:
    from safe_guidance.nodes.detect_and_guide import DAGDetectionMapNode

    tokens = GuidelineTokens(torch.randn(2, 96, generator=torch.Generator().manual_seed(2)))
    latents = {"samples": torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(1))}
    DAGDetectionMapNode.hidden = None
    mask, sheet, report = DAGDetectionMapNode.execute(
        model=host.model,
        vae=host.vae,
        guideline_tokens=tokens,
        positive=host.text(STAR),
        samples=latents,
        sigmas="5, 1",
        seed=0,
    ).args
    assert mask.shape == (2, 128, 96) and sheet.shape == (2, 128, 3 * 96, 3)
    assert len(report.split("\n")) == 2 and "sigma 5:" in report and "sigma 1:" in report


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"masks": torch.ones(2, 128, 128)}, "3 images but 2 masks"),
        ({"masks": torch.zeros(3, 128, 128)}, "No image has a mask"),
        ({"safe_images": torch.zeros(1, 64, 64, 3)}, "have another size"),
        ({"sigmas": "five"}, "is not a list of noise levels"),
        ({"sigmas": "-1"}, "is not a list of noise levels"),
        ({"scales": "1/4", "sigmas": ""}, "is not a list of noise levels"),
    ],
    ids=["masks missing", "empty masks", "sizes differ", "words for numbers", "negative noise", "no noise"],
)
def test_input_that_cannot_be_learnt_from_is_explained(
    host: Any, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        optimised(host, **change)


def test_masks_of_another_size_and_one_for_all(host: Any) -> None:
    halved = torch.nn.functional.avg_pool2d(annotated()[1][:, None], 2)[:, 0]
    torch.testing.assert_close(
        optimised(host, masks=halved)[0].embeddings, optimised(host)[0].embeddings, atol=0.2, rtol=0.2
    )
    assert isinstance(optimised(host, masks=torch.ones(1, 128, 128), safe_images=None)[0], GuidelineTokens)


def test_models_without_cross_attention_cannot_learn(host: Any, tiny: Any) -> None:
    from safe_guidance.guidance.detect_and_guide.annotated_images import AnnotatedImages
    from safe_guidance.nodes.host.attention.annotated_recording import record_images

    with pytest.raises(ValueError, match="cannot be learnt from the attention of this model .TinySD3"):
        example = AnnotatedImages(torch.zeros(1, 64, 64, 3), torch.ones(1, 64, 64))
        record_images(tiny.tiny_model("sd3"), host.clip, host.vae, example, [""], (1.0,), (2,), 0)
    with pytest.raises(ValueError, match="cannot be learnt from the attention of this model .TinyFlux"):
        recorded(host, model=tiny.tiny_model("flux"))
