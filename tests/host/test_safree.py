"""SAFREE in the host's text encoders: identity, per-encoder filtering, long prompts, the switch over noise levels."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safe_guidance.guidance.safree import SelfValidation, subspace_projector

STAR = "a yellow star in the center on a black plain background, flat style"
HEART = "a red heart on the left on a grey striped background, dotted style"


@pytest.fixture(autouse=True)
def _as_the_server_runs_prompts() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def safree(host: Any) -> Any:
    from safe_guidance.nodes import safree as node
    from safe_guidance.nodes.host import safree as inside

    def filtered(text: str, *concepts: str, clip: Any = None, alpha: float = 0.01, validation: SelfValidation | None = None) -> Any:
        return inside.filter_text(clip or host.clip, text, concepts or ("star",), alpha, validation)

    return SimpleNamespace(node=node, inside=inside, filtered=filtered)


def encoded(host: Any, text: str) -> torch.Tensor:
    return host.nodes.CLIPTextEncode().encode(host.clip, text)[0][0][0]


def test_a_prompt_without_toxic_words_is_encoded_as_ever(host: Any, safree: Any) -> None:
    found = safree.filtered(HEART, alpha=10.0)
    assert len(found.conditioning) == 1 and found.conditioning[0][1].keys() == {"pooled_output"}
    assert torch.equal(found.conditioning[0][0], encoded(host, HEART)) and found.last_step == -1
    for text in ("", "star"):
        assert torch.equal(safree.filtered(text).conditioning[0][0], encoded(host, text))


def test_the_named_concept_is_found_and_leaves_the_concept_space(host: Any, safree: Any) -> None:
    found = safree.filtered(STAR)
    assert "star" in [judged.token for judged in found.judged if judged.toxic]
    assert [judged.token for judged in found.judged] == "a yellow star in the center on a black plain background , flat style".split()
    plain, filtered = encoded(host, STAR), found.conditioning[0][0]
    toxic = torch.tensor([False, *(judged.toxic for judged in found.judged), *[False] * (76 - len(found.judged))])
    assert torch.equal((filtered != plain).any(dim=-1)[0], toxic)
    projector = safree.inside.concept_projectors(host.clip, ["star"])["clip_l"].float()
    assert (filtered[0, toxic] @ projector).abs().max() < 1e-4
    assert (plain[0, toxic] @ projector).abs().max() > 1e-2


def test_the_concept_space_is_that_of_the_phrases_end_marks(host: Any, safree: Any) -> None:
    rows = torch.stack([encoded(host, phrase)[0, 2] for phrase in ("star", "heart")])
    torch.testing.assert_close(safree.inside.concept_projectors(host.clip, ["star", "heart"])["clip_l"], subspace_projector(rows))


def test_the_encoders_are_themselves_again_afterwards(host: Any, safree: Any) -> None:
    before = encoded(host, STAR)
    safree.filtered(STAR)
    with pytest.raises(RuntimeError, match="in between"):
        with safree.inside._standing_in(host.clip, lambda *_: None):
            raise RuntimeError("in between")
    assert "encode_token_weights" not in vars(host.clip.cond_stage_model.clip_l)
    assert torch.equal(encoded(host, STAR), before)


def test_long_and_weighted_prompts(host: Any, safree: Any) -> None:
    long = ", ".join([HEART] * 8 + ["a (yellow star:1.4)"])
    found = safree.filtered(long)
    plain = encoded(host, long)
    assert found.conditioning[0][0].shape == plain.shape and plain.shape[1] == 154
    changed = (found.conditioning[0][0] != plain).any(dim=-1)[0]
    # The first section holds 75 tokens between its marks, the second the rest.
    toxic = [judged.toxic for judged in found.judged]
    assert changed[1:76].tolist() == toxic[:75] and changed[78 : 78 + len(toxic) - 75].tolist() == toxic[75:]
    assert any(toxic[:75]) and any(toxic[75:]) and int(changed.sum()) == sum(toxic)


@pytest.mark.parametrize(("last_step", "expected"), [(0, 1), (2, 3), (10, 11)])
def test_the_switch_lies_between_the_papers_steps(host: Any, safree: Any, last_step: int, expected: int) -> None:
    """Of the papers' 50 noise levels, those up to the step use the first conditioning, the rest the second; never both."""
    from comfy.samplers import calculate_start_end_timesteps

    from safe_guidance.guidance.paper_schedule import sigma_of_step

    conds = [dict(entry[1]) for entry in safree.inside.switched(host.text(STAR), host.text(HEART), last_step)]
    model = SimpleNamespace(model_sampling=host.model.get_model_object("model_sampling"))
    calculate_start_end_timesteps(model, conds)
    used = [[c["timestep_end"] <= sigma_of_step(i) <= c["timestep_start"] for c in conds] for i in range(50)]
    assert used == [[True, False]] * expected + [[False, True]] * (50 - expected)


def test_sampling_switches_from_the_filtered_prompt_to_the_prompt(host: Any, safree: Any) -> None:
    plain, filtered = host.text(STAR), host.text(HEART)
    counted, rows = host.count_calls(host.model)
    mixed = host.sample(counted, safree.inside.switched(filtered, plain, 5), host.empty_latent(), steps=6)
    assert rows == [2] * 6, "one of the two is used at every step, and costs nothing more"
    assert not torch.equal(mixed, host.sample(host.model, plain)) and not torch.equal(mixed, host.sample(host.model, filtered))
    torch.testing.assert_close(
        host.sample(host.model, safree.inside.switched(plain, plain, 5), host.empty_latent()), host.sample(host.model, plain)
    )


def test_self_validation_chooses_the_steps(safree: Any) -> None:
    class Fixed(SelfValidation):
        def last_step(self, beta: float) -> int:
            return 7

    found = safree.filtered(STAR, validation=Fixed())
    assert found.last_step == 7 and len(found.conditioning) == 2
    assert found.conditioning[1][1]["end_percent"] == 1.0
    assert safree.filtered(STAR).last_step is None
    assert safree.filtered(STAR, validation=SelfValidation()).last_step == SelfValidation().last_step(found.change)


def pair_clip(host: Any) -> Any:
    """A CLIP with SDXL's two encoders at small size and random weights, from the host's own classes."""
    import comfy.sd
    import comfy.sdxl_clip
    import comfy.supported_models_base

    def config(width: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
            "projection_dim": width,
            "vocab_size": 49408,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }

    options = {"clip_l_model_config": config(32), "clip_g_model_config": config(64), "dtype": torch.float32}
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    clip = comfy.sd.CLIP(target, tokenizer_data={}, model_options=options)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.ones(t.shape) if t.ndim == 1 and name.endswith("weight") else 0.3 * torch.randn(t.shape, generator=generator)
        for name, t in clip.cond_stage_model.state_dict().items()
    }
    clip.cond_stage_model.load_state_dict(weights)
    return clip


def test_models_with_two_encoders_are_filtered_per_encoder(host: Any, safree: Any) -> None:
    clip = pair_clip(host)
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(STAR))[0]
    found = safree.filtered(STAR, clip=clip)
    assert {judged.encoder for judged in found.judged} == {"clip_l", "clip_g"}
    conditioning = found.conditioning[0]
    assert conditioning[0].shape == plain[0].shape == (1, 77, 96)
    changed = conditioning[0] != plain[0]
    for name, columns in (("clip_l", slice(0, 32)), ("clip_g", slice(32, 96))):
        toxic = torch.tensor([judged.toxic for judged in found.judged if judged.encoder == name])
        assert torch.equal(changed[0, 1 : 1 + len(toxic), columns].any(dim=-1), toxic)
        projector = safree.inside.concept_projectors(clip, ["star"])[name].float()
        rows = conditioning[0][0, 1 : 1 + len(toxic), columns][toxic]
        assert (rows @ projector).abs().max() < 1e-3
    assert torch.equal(conditioning[1]["pooled_output"], plain[1]["pooled_output"])
    assert safree.inside.validation_for("as published", clip) is None
    assert safree.inside.validation_for("as published", host.clip) == SelfValidation()


def test_the_node(host: Any, safree: Any) -> None:
    node = safree.node.SafreeTextFilter
    conditioning, unfiltered, negative, told = node.execute(host.clip, STAR, "star\n sparkle, badge", 0.01, "all").args
    assert negative == "star, sparkle, badge" and "star" in told.splitlines()[0]
    assert torch.equal(unfiltered[0][0], encoded(host, STAR)) and not torch.equal(conditioning[0][0], unfiltered[0][0])
    assert node.execute(host.clip, HEART, "star", 5.0, "all").args[3].startswith("Nothing was filtered")
    with pytest.raises(ValueError, match="no concept"):
        node.execute(host.clip, STAR, " ,\n", 0.01, "all")
    with pytest.raises(ValueError, match="no CLIP"):
        node.execute(None, STAR, "star", 0.01, "all")
