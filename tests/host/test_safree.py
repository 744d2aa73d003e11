"""SAFREE in the host's text encoders: identity, filtering per encoder, long prompts, switching the prompt."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from demo_prompts import HEART, STAR
from safe_guidance.guidance.safree import SelfValidation, subspace_projector

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


@pytest.fixture
def safree(host: Any) -> Any:
    from safe_guidance.nodes import safree as node
    from safe_guidance.nodes.host.methods import safree as inside

    def filtered(
        text: str,
        *concepts: str,
        clip: Any = None,
        alpha: float = 0.01,
        validation: SelfValidation | None = None,
    ) -> Any:
        return inside.filter_text(clip or host.clip, text, concepts or ("star",), alpha, validation)

    return SimpleNamespace(node=node, inside=inside, filtered=filtered)


def encoded(host: Any, text: str) -> torch.Tensor:
    return host.nodes.CLIPTextEncode().encode(host.clip, text)[0][0][0]


def test_a_prompt_without_toxic_words_is_encoded_unchanged(host: Any, safree: Any) -> None:
    found = safree.filtered(HEART, alpha=10.0)
    assert len(found.conditioning) == 1 and found.conditioning[0][1].keys() == {"pooled_output"}
    assert torch.equal(found.conditioning[0][0], encoded(host, HEART)) and found.last_step == -1
    for text in ("", "star"):
        assert torch.equal(safree.filtered(text).conditioning[0][0], encoded(host, text))


def test_the_named_concept_is_found_and_leaves_the_concept_space(host: Any, safree: Any) -> None:
    found = safree.filtered(STAR)
    assert "star" in [judged.token for judged in found.verdicts if judged.toxic]
    assert [
        judged.token for judged in found.verdicts
    ] == "a yellow star in the center on a black plain background , flat style".split()
    plain, filtered = encoded(host, STAR), found.conditioning[0][0]
    toxic = torch.tensor(
        [False, *(judged.toxic for judged in found.verdicts), *[False] * (76 - len(found.verdicts))]
    )
    assert torch.equal((filtered != plain).any(dim=-1)[0], toxic)
    projector = safree.inside.concept_subspaces(host.clip, ["star"])["clip_l"].projector.float()
    assert (filtered[0, toxic] @ projector).abs().max() < 1e-4
    assert (plain[0, toxic] @ projector).abs().max() > 1e-2


def test_the_concept_space_is_that_of_the_phrases_end_marks(host: Any, safree: Any) -> None:
    rows = torch.stack([encoded(host, phrase)[0, 2] for phrase in ("star", "heart")])
    torch.testing.assert_close(
        safree.inside.concept_subspaces(host.clip, ["star", "heart"])["clip_l"].projector,
        subspace_projector(rows),
    )


def test_the_encoders_are_themselves_again_afterwards(host: Any, safree: Any) -> None:
    before = encoded(host, STAR)
    safree.filtered(STAR)
    with pytest.raises(RuntimeError, match="in between"):
        with safree.inside._replaced_encoders(host.clip, lambda *_: None):
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
    toxic = [judged.toxic for judged in found.verdicts]
    assert changed[1:76].tolist() == toxic[:75] and changed[78 : 78 + len(toxic) - 75].tolist() == toxic[75:]
    assert any(toxic[:75]) and any(toxic[75:]) and int(changed.sum()) == sum(toxic)


@pytest.mark.parametrize(("last_step", "expected"), [(0, 1), (2, 3), (10, 11)])
def test_the_switch_lies_between_the_papers_steps(
    host: Any, safree: Any, last_step: int, expected: int
) -> None:
    """Of the paper's 50 noise levels, those up to the step use the first text and the others the second."""
    from comfy.samplers import calculate_start_end_timesteps

    from safe_guidance.guidance.core.paper_schedule import sigma_of_step

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
    assert not torch.equal(mixed, host.sample(host.model, plain)) and not torch.equal(
        mixed, host.sample(host.model, filtered)
    )
    torch.testing.assert_close(
        host.sample(host.model, safree.inside.switched(plain, plain, 5), host.empty_latent()),
        host.sample(host.model, plain),
    )


def test_self_validation_chooses_the_steps(safree: Any) -> None:
    class Fixed(SelfValidation):
        def last_step(self, beta: float) -> int:
            return 7

    found = safree.filtered(STAR, validation=Fixed())
    assert found.last_step == 7 and len(found.conditioning) == 2
    assert found.conditioning[1][1]["end_percent"] == 1.0
    assert safree.filtered(STAR).last_step is None
    assert safree.filtered(STAR, validation=SelfValidation()).last_step == SelfValidation().last_step(
        found.change
    )


def test_models_with_two_encoders_are_filtered_per_encoder(host: Any, tiny: ModuleType, safree: Any) -> None:
    clip = tiny.tiny_clip("sdxl")
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(STAR))[0]
    found = safree.filtered(STAR, clip=clip, alpha=0.001)
    assert {judged.encoder for judged in found.verdicts} == {"clip_l", "clip_g"}
    conditioning = found.conditioning[0]
    assert conditioning[0].shape == plain[0].shape == (1, 77, 96)
    changed = conditioning[0] != plain[0]
    for name, columns in (("clip_l", slice(0, 32)), ("clip_g", slice(32, 96))):
        toxic = torch.tensor([judged.toxic for judged in found.verdicts if judged.encoder == name])
        assert toxic.any() and torch.equal(changed[0, 1 : 1 + len(toxic), columns].any(dim=-1), toxic)
        projector = safree.inside.concept_subspaces(clip, ["star"])[name].projector.float()
        rows = conditioning[0][0, 1 : 1 + len(toxic), columns][toxic]
        assert (rows @ projector).abs().max() < 1e-3
    assert torch.equal(conditioning[1]["pooled_output"], plain[1]["pooled_output"])
    assert safree.node.validation_for("as published", clip) is None
    assert safree.node.validation_for("as published", host.clip) == SelfValidation()


PLACES = {
    "flux": {"t5xxl": (0, slice(0, 32))},
    "sd3": {"clip_l": (1, slice(0, 32)), "clip_g": (1, slice(32, 96)), "t5xxl": (77, slice(None))},
}
"""Row of the first word and columns in the conditioning, by encoder; Flux uses only CLIP's pooled vector."""


@pytest.mark.parametrize("family", list(PLACES))
def test_t5_is_filtered_by_its_own_words(host: Any, tiny: ModuleType, safree: Any, family: str) -> None:
    """Rows change where their own encoder finds toxic tokens, and leave the concepts' subspace."""
    clip = tiny.tiny_clip(family)
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(STAR))[0]
    found = safree.filtered(STAR, "star", "sparkling badge", clip=clip)
    conditioning, concepts = (
        found.conditioning[0],
        safree.inside.concept_subspaces(clip, ["star", "sparkling badge"]),
    )
    changed, expected = conditioning[0][0] != plain[0][0], torch.zeros(plain[0].shape[1:], dtype=torch.bool)
    for name, (first, columns) in PLACES[family].items():
        toxic = torch.tensor([judged.toxic for judged in found.verdicts if judged.encoder == name])
        assert not toxic.all()
        expected[first : first + len(toxic), columns] = toxic[:, None]
        filtered = conditioning[0][0, first : first + len(toxic), columns][toxic]
        assert (
            (filtered @ concepts[name].projector.float()).norm(dim=-1) < 1e-3 * filtered.norm(dim=-1)
        ).all()
    assert expected[PLACES[family]["t5xxl"][0] :].any() and torch.equal(
        changed.any(dim=-1), expected.any(dim=-1)
    )
    assert not changed[~expected].any()
    assert torch.equal(conditioning[1]["pooled_output"], plain[1]["pooled_output"])
    # T5 has no token for the whole sentence, so the mean over its words is used.
    words = clip.tokenize("star")["t5xxl"][0]
    count = [token for token, _ in words].index(1)
    first = PLACES[family]["t5xxl"][0]
    sentence = clip.encode_from_tokens_scheduled(clip.tokenize("star"))[0][0][0, first : first + count].mean(
        dim=0, keepdim=True
    )
    torch.testing.assert_close(
        safree.inside.concept_subspaces(clip, ["star"])["t5xxl"].projector, subspace_projector(sentence)
    )


def test_the_report_says_which_encoder_judged_what(host: Any, tiny: ModuleType, safree: Any) -> None:
    clip = tiny.tiny_clip("flux")
    _, _, _, told = safree.node.SafreeTextFilterNode.execute(clip, STAR, "star", 0.01, "all").args
    found = safree.filtered(STAR, clip=clip)
    of = {name: [j for j in found.verdicts if j.encoder == name] for name in ("clip_l", "t5xxl")}
    for name, judged in of.items():
        toxic = list(dict.fromkeys(j.token for j in judged if j.toxic))
        assert toxic and f"{name}: {', '.join(toxic)}" in told.splitlines()[0]
    assert all(judged.token.strip() for judged in found.verdicts), (
        "a token that is a mere space must have a name"
    )
    lines = told.splitlines()
    assert sum(line.startswith("t5xxl ") for line in lines) == len(of["t5xxl"]) != len(of["clip_l"])


def test_what_the_filter_costs_once(host: Any, safree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It encodes the prompt twice, once without each of its words, and every concept twice."""
    import comfy.sd1_clip

    sentences: list[int] = []
    forward = comfy.sd1_clip.SDClipModel.forward

    def counting(self: Any, tokens: list[Any]) -> Any:
        sentences.append(len(tokens))
        return forward(self, tokens)

    monkeypatch.setattr(comfy.sd1_clip.SDClipModel, "forward", counting)
    encoded(host, STAR)
    once = sum(sentences)
    sentences.clear()
    found = safree.filtered(STAR, "star", "badge")
    assert sum(sentences) == len(found.verdicts) + 2 * once + 2 * (1 + once)


def test_the_node(host: Any, safree: Any) -> None:
    node = safree.node.SafreeTextFilterNode
    conditioning, unfiltered, negative, told = node.execute(
        host.clip, STAR, "star\n sparkle, badge", 0.01, "all"
    ).args
    assert negative == "star, sparkle, badge" and "star" in told.splitlines()[0]
    assert torch.equal(unfiltered[0][0], encoded(host, STAR)) and not torch.equal(
        conditioning[0][0], unfiltered[0][0]
    )
    assert node.execute(host.clip, HEART, "star", 5.0, "all").args[3].startswith("Nothing was filtered")
    with pytest.raises(ValueError, match="no concept"):
        node.execute(host.clip, STAR, " ,\n", 0.01, "all")
    with pytest.raises(ValueError, match="no CLIP"):
        node.execute(None, STAR, "star", 0.01, "all")


def test_concepts_that_span_the_whole_space_leave_words_that_are_not_zero(host: Any, safree: Any) -> None:
    colours = ("blue", "brown", "green", "grey", "purple", "red", "teal", "white", "yellow", "black")
    shapes = ("ball", "box", "circle", "cross", "disc", "heart", "plus", "square", "star", "triangle")
    words = [f"{colour} {shape}" for colour in colours for shape in shapes]
    found = safree.filtered(STAR, *words, alpha=-1.0)
    width = encoded(host, STAR).shape[-1]
    (limited,) = found.limited.values()
    assert limited.used == width // 2 < limited.spanned
    filtered = found.conditioning[0][0][0]
    toxic = [i + 1 for i, judged in enumerate(found.verdicts) if judged.toxic]
    assert (
        toxic and filtered[toxic].norm(dim=1).min() > 0.01 * encoded(host, STAR)[0, toxic].norm(dim=1).max()
    )
    report = safree.node.SafreeTextFilterNode.execute(host.clip, STAR, "\n".join(words), -1.0, "all").args[3]
    assert f"only their {width // 2} main directions are removed. Use fewer phrases." in report
    assert not safree.filtered(STAR).limited
