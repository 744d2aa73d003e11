"""The fitted decoder: recovers a decoder that is linear, and is the best of its kind for one that is not."""

from __future__ import annotations

import pytest
import torch

from safe_guidance.guidance.safety_functions.linear_decoder import (
    LinearDecoder,
    fit_linear_decoder,
    sample_images,
)


def test_a_linear_decoder_is_recovered() -> None:
    torch.manual_seed(0)
    truth, latents = LinearDecoder(4, 2).requires_grad_(False), torch.randn(6, 4, 16, 16)
    found = fit_linear_decoder(latents, truth(latents))
    fresh = torch.randn(2, 4, 16, 16)
    error = (found(fresh) - truth(fresh)).square().mean() / truth(fresh).var()
    assert error < 1e-5


def test_no_smaller_error_in_any_direction() -> None:
    torch.manual_seed(0)
    latents = torch.randn(4, 3, 12, 12)
    images = torch.tanh(LinearDecoder(3, 4)(latents)).detach()
    found = fit_linear_decoder(latents, images)
    best = (found(latents) - images).square().mean()
    for seed in range(5):
        with torch.no_grad():
            weight = found.convolution.weight.clone()
            found.convolution.weight += 0.02 * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(seed)
            )
            assert (found(latents) - images).square().mean() > best
            found.convolution.weight.copy_(weight)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="whole multiple"):
        fit_linear_decoder(torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 60, 60))


def test_sample_images_are_images_and_always_the_same() -> None:
    state = torch.get_rng_state()
    images = sample_images(3, 64)
    assert images.shape == (3, 3, 64, 64) and images.amin() >= 0 and images.amax() <= 1
    assert torch.equal(images, sample_images(3, 64)) and torch.equal(state, torch.get_rng_state())
    assert images.std() > 0.1
