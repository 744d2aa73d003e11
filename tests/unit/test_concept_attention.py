"""Concept maps in the output space of joint attention, against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from safe_guidance.guidance.detect_and_guide.concept_attention import concept_outputs, output_maps


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_concepts_attend_to_themselves_and_to_the_image() -> None:
    q, k, v = (random(2, 3, 4, 5, seed=s) for s in range(3))
    image_k, image_v = (random(2, 3, 6, 5, seed=s) for s in (3, 4))
    found = concept_outputs(q, k, v, image_k, image_v)
    assert found.shape == (2, 4, 15)
    for row in range(2):
        for head in range(3):
            for concept in range(4):
                keys = [*k[row, head], *image_k[row, head]]
                values = [*v[row, head], *image_v[row, head]]
                weights = [math.exp(float(q[row, head, concept] @ key) / math.sqrt(5)) for key in keys]
                mean = sum(w * value for w, value in zip(weights, values)) / sum(weights)
                torch.testing.assert_close(found[row, concept, head * 5 : head * 5 + 5], mean)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_a_map_is_the_share_of_a_concept_at_every_position(temperature: float) -> None:
    concepts, image = random(2, 3, 7, seed=0), random(2, 12, 7, seed=1)
    maps = output_maps(concepts, image, (3, 4), temperature)
    assert maps.shape == (2, 3, 3, 4) and maps.dtype == torch.float32
    for row in range(2):
        for position in range(12):
            weights = [math.exp(float(c @ image[row, position]) / temperature) for c in concepts[row]]
            expected = torch.tensor([w / sum(weights) for w in weights])
            torch.testing.assert_close(
                maps[row, :, position // 4, position % 4], expected, atol=1e-5, rtol=1e-5
            )


def test_an_output_like_that_of_one_concept_belongs_to_it() -> None:
    """Give the image the output of concept 1 in its left half and that of the background elsewhere."""
    concepts = 5 * torch.eye(3)[None]
    image = concepts[:, [1, 1, 0, 0, 1, 1, 0, 0]]
    maps = output_maps(concepts, image, (2, 4))
    assert (maps[0, 1, :, :2] > 0.99).all() and (maps[0, 0, :, 2:] > 0.99).all()
