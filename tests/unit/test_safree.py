"""SAFREE: projectors, the judgement of tokens, the self-validating filter, and the latent re-attention's
identities.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safe_guidance.guidance.safree import (
    ARTIST_VALIDATION,
    NUDITY_CONCEPTS,
    SelfValidation,
    concept_distances,
    concept_subspace,
    filter_change,
    filter_prompt,
    filtered_embeddings,
    others_mean,
    reattention,
    subspace_projector,
    toxic_tokens,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 1000), count=st.integers(1, 17), copies=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_projector_is_one_and_the_rest_is_orthogonal_to_the_concepts(
    seed: int, count: int, copies: bool
) -> None:
    rows = normal(count, 40, seed=seed)
    if copies:
        rows = torch.cat([rows, rows[:1] * 2])
    projector = subspace_projector(rows)
    torch.testing.assert_close(projector @ projector, projector, atol=1e-10, rtol=0)
    torch.testing.assert_close(projector, projector.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(rows @ (torch.eye(40) - projector), torch.zeros_like(rows), atol=1e-9, rtol=0)
    assert torch.linalg.matrix_rank(projector).item() == count
    # The textbook form, which squares the condition number.
    textbook = rows.T @ torch.linalg.pinv(rows @ rows.T) @ rows
    torch.testing.assert_close(projector, textbook, atol=1e-7, rtol=0)


def test_the_papers_list() -> None:
    assert len(NUDITY_CONCEPTS) == 17


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=30))
def test_the_mean_of_the_others_equals_the_loop(values: list[float]) -> None:
    distances = torch.tensor(values, dtype=torch.float64)
    loop = [sum(v for j, v in enumerate(values) if j != i) / (len(values) - 1) for i in range(len(values))]
    torch.testing.assert_close(others_mean(distances), torch.tensor(loop, dtype=torch.float64))


def test_a_token_is_toxic_when_the_sentence_without_it_is_further_away() -> None:
    distances = torch.tensor([1.0, 1.0, 1.0, 1.5])
    assert toxic_tokens(distances, 0.01).tolist() == [False, False, False, True]
    assert not toxic_tokens(distances, 0.6).any()
    # Equality is toxic: "safe" means strictly less.
    assert toxic_tokens(torch.ones(3, dtype=torch.float64), 0.0).all()


def test_a_single_token_is_left_alone() -> None:
    assert toxic_tokens(torch.tensor([3.0]), 0.01).tolist() == [False]
    assert toxic_tokens(torch.tensor([]), 0.01).tolist() == []


def test_distances_are_those_to_the_subspace() -> None:
    concepts = subspace_projector(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    assert concept_distances(torch.tensor([[3.0, 4, 12], [1, 1, 0]]), concepts).tolist() == pytest.approx(
        [12, 0]
    )


@given(seed=st.integers(0, 200), count=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_any_number_of_concepts_leaves_room_for_the_prompt(seed: int, count: int) -> None:
    rows, prompt = normal(count, 16, seed=seed), normal(6, 16, seed=seed + 1)
    found = concept_subspace(rows)
    assert found.spanned == min(count, 16) and found.used == min(count, 8)
    assert torch.linalg.matrix_rank(found.projector).item() == found.used
    kept = filtered_embeddings(prompt, subspace_projector(prompt), found.projector)
    assert kept.norm(dim=1).min() > 0.05 * prompt.norm(dim=1).min()
    if found.used == found.spanned:
        torch.testing.assert_close(found.projector, subspace_projector(rows), atol=1e-9, rtol=0)


def test_too_many_concepts_keep_their_main_directions() -> None:
    rows = torch.diag(torch.arange(1.0, 5.0))
    torch.testing.assert_close(
        concept_subspace(rows).projector.diagonal(), torch.tensor([0, 0, 1, 1]).double()
    )


@pytest.mark.parametrize(
    ("beta", "steps", "artist"), [(0.45, 0, 0), (0.5, 2, 0), (0.5333, 5, 2), (0.55, 7, 5), (0.6, 10, 10)]
)
def test_the_self_validating_filters_steps(beta: float, steps: int, artist: int) -> None:
    assert SelfValidation().last_step(beta) == steps
    assert ARTIST_VALIDATION.last_step(beta) == artist


def planted(toxic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Make token embeddings (6, 12), masked sentences (4, 12) and a concept projector.

    The last real token carries the concept or does not.
    """
    concept = torch.eye(12, dtype=torch.float64)[0]
    tokens = 0.3 * normal(6, 12, seed=3)
    tokens[:, 0] = 0.1
    masked = 0.3 * normal(4, 12, seed=4)
    masked[:, 0] = 3.0
    masked[:, 1:] /= torch.linalg.vector_norm(masked[:, 1:], dim=1, keepdim=True)
    if toxic:
        masked[3, 0] = 0.0
        masked[3, 1:] *= 2
    return tokens, masked, subspace_projector(concept[None])


def test_only_toxic_rows_change_and_become_orthogonal_to_the_concept() -> None:
    tokens, masked, concepts = planted(toxic=True)
    found = filter_prompt(tokens, masked, concepts, judged=slice(1, 5), sentence=slice(0, 6))
    assert found.toxic.tolist() == [False, False, False, True]
    assert torch.equal(found.embeddings[:4], tokens[:4]) and torch.equal(found.embeddings[5], tokens[5])
    assert (found.embeddings[4] @ concepts).abs().max() < 1e-12
    assert tokens[4, 0] == 0.1, "the given embeddings must stay as they are"


def test_no_toxic_token_returns_the_embeddings_themselves() -> None:
    tokens, masked, concepts = planted(toxic=False)
    found = filter_prompt(tokens, masked, concepts, judged=slice(1, 5), sentence=slice(0, 6))
    assert found.embeddings is tokens and not found.toxic.any()


def test_the_change_is_measured_over_the_sentence() -> None:
    a = torch.tensor([[1.0, 0], [1, 0]])
    assert filter_change(a, torch.tensor([[2.0, 0], [0, 3]])) == pytest.approx(0.5)
    tokens, masked, concepts = planted(toxic=True)
    filtered = filtered_embeddings(tokens, subspace_projector(masked), concepts)
    assert 0 < filter_change(tokens, filtered) < 2
    # The order that keeps the result off the concepts, whatever the prompt spans.
    assert (filtered @ concepts).abs().max() < 1e-12


def test_reattention_with_scale_one_is_the_identity() -> None:
    safe, original = normal(2, 3, 8, 8, seed=1), normal(2, 3, 8, 8, seed=2)
    assert reattention(safe, original, 1.0) is safe


def test_reattention_damps_only_low_frequencies_that_exceed_the_original() -> None:
    """Against an independent inverse transform.

    The mean, a low frequency, is halved where it is the larger one.
    """
    ripple = torch.cos(torch.arange(8) * math.pi).expand(8, 8).double()
    safe, original = (2.0 + ripple)[None, None], (1.0 + ripple)[None, None]
    torch.testing.assert_close(reattention(safe, original, 0.5), (1.0 + ripple)[None, None])
    torch.testing.assert_close(reattention(original, safe, 0.5), original)


@given(seed=st.integers(0, 500), scale=st.floats(0.1, 0.99), size=st.sampled_from([(8, 8), (4, 6), (16, 8)]))
@settings(max_examples=25, deadline=None)
def test_reattention_never_adds_energy(seed: int, scale: float, size: tuple[int, int]) -> None:
    safe, original = normal(1, 2, *size, seed=seed), normal(1, 2, *size, seed=seed + 1)
    assert reattention(safe, original, scale).square().sum() <= safe.square().sum() * (1 + 1e-9)
