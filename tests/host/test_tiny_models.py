"""The tiny models of every family sample in the real host, reproducibly, and depend on their text."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux")


def sample(host: Any, tiny: ModuleType, family: str, text: int, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        model = tiny.tiny_model(family, **options)
        latent = {"samples": torch.zeros(1, tiny.latent_channels(model), 8, 8)}
        positive, negative = tiny.tiny_conditioning(text), tiny.tiny_conditioning(9)
        result = host.nodes.common_ksampler(model, 1, 2, 3.0, "euler", "normal", positive, negative, latent)
        return result[0]["samples"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_samples_and_follows_its_text(host: Any, tiny: ModuleType, family: str) -> None:
    first = sample(host, tiny, family, text=0)
    assert torch.isfinite(first).all() and first.std() > 0
    assert torch.equal(first, sample(host, tiny, family, text=0))
    assert not torch.equal(first, sample(host, tiny, family, text=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_stored_and_computing_types_may_differ(host: Any, tiny: ModuleType, dtype: torch.dtype) -> None:
    cast = sample(host, tiny, "sd1", text=0, dtype=dtype, compute=torch.float32)
    assert torch.isfinite(cast).all()
    assert not torch.equal(cast, sample(host, tiny, "sd1", text=0))
