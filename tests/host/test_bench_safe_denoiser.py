"""The benchmark of large sets, run with small ones: both placements are measured, and the method acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def bench(host: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from safe_guidance.evaluation.benches import safe_denoiser

    monkeypatch.setattr(safe_denoiser, "SHAPE", (4, 16, 16))
    monkeypatch.setattr(safe_denoiser, "plain_seconds_per_step", lambda steps: 2.0)
    return safe_denoiser


def test_rows(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.inference_mode():
        rows = bench.measure([7, 600], 1, calls=3)
    assert [(row.references, row.placement) for row in rows] == [
        (count, placement) for count in (7, 600) for placement in ("in memory", "streamed from disk")
    ]
    for row in rows:
        assert row.method_seconds_per_step > 0 and row.share == pytest.approx(
            row.method_seconds_per_step / 2.0
        )
        assert row.private_memory_mb >= 0
    assert capsys.readouterr().out.count("ms/step") == 4


def test_every_reference_has_its_negative(bench: Any, tmp_path: Path) -> None:
    latents = bench.random_references(tmp_path / "a.latents", 300).latents
    assert latents.shape == (300, 4, 16, 16)
    assert torch.equal(latents[:128], -latents[128:256])


def test_the_model_has_the_size_of_the_real_one(host: Any) -> None:
    """The parameters are counted from the model's description, without making 3 GB of weights."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from safe_guidance.evaluation.benches.sd15_unet import UNET

    described = {key: list(value) if isinstance(value, list) else value for key, value in UNET.items()}
    described.pop("use_temporal_attention"), described.pop("use_temporal_resblock")
    with torch.device("meta"):
        network = UNetModel(**described, device="meta", operations=comfy.ops.disable_weight_init)
    assert sum(parameter.numel() for parameter in network.parameters()) == 859_520_964
