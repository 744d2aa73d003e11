"""Studies draw what the host's own sampler draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safe_guidance.evaluation.in_process_sampler import BATCH, InProcessSampler
from safe_guidance.evaluation.prompt_sets.prompts import load_prompts

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


def test_the_in_process_sampler_draws_as_ksampler_does(host: Any) -> None:
    """A single record gives the same bits; in a batch the host rounds differently."""
    records = load_prompts()["named"][: BATCH + 1]
    drawn = InProcessSampler().draw(host.model, records)
    assert drawn.shape == (BATCH + 1, 3, 128, 128)
    latents = [
        host.sample(host.model, host.text(record.prompt), seed=record.seed, steps=20)
        for record in (records[0], records[-1])
    ]
    first, last = (host.vae.decode(latent)[0].movedim(-1, 0).clamp(0, 1) for latent in latents)
    assert torch.equal(drawn[-1], last)
    torch.testing.assert_close(drawn[0], first, atol=0.02, rtol=0)


def test_the_in_process_sampler_takes_another_text_sampler_and_noise(host: Any) -> None:
    import comfy.samplers

    sampler, records = InProcessSampler(), load_prompts()["benign"][:2]
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = sampler.draw(host.model, records, noise=noise)
    assert torch.equal(plain, sampler.draw(host.model, records, noise=noise))
    changes: list[dict[str, Any]] = [
        {"negative": "a star"},
        {"cfg": 1.0},
        {"sampler": comfy.samplers.sampler_object("euler")},
        {"scheduler": "normal"},
        {"noise": noise.flip(0)},
    ]
    for change in changes:
        assert not torch.equal(plain, sampler.draw(host.model, records, **{"noise": noise, **change}))
