"""The benchmark of STG on a small UNet: every variant is measured beside the plain sampler and acts as
it says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


def test_rows(host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from safe_guidance.evaluation.benches import safe_text_guidance as bench
    from safe_guidance.evaluation.benches import sd15_unet
    from safe_guidance.nodes.host.methods import safe_text_guidance

    monkeypatch.setattr(sd15_unet, "UNET", sd15_unet.UNET | {"model_channels": 32})
    differentiated: list[bool] = []
    gradients = safe_text_guidance.text_gradients

    def counted(*args: Any) -> Any:
        differentiated.append(args[-1])
        return gradients(*args)

    monkeypatch.setattr(safe_text_guidance, "text_gradients", counted)
    with torch.inference_mode():
        rows = bench.measure(1, 16)
    ways = ("untriggered", "triggered", "triggered, saving memory")
    assert [row.name for row in rows] == [
        "plain",
        *(f"{decoder}, {way}" for decoder in ("taesd", "linear") for way in ways),
    ]
    assert all(row.ratio == pytest.approx(row.seconds_per_step / row.plain_seconds_per_step) for row in rows)
    # For each decoder: a warm-up and the measured step, without and with saving memory.
    assert differentiated == [False, False, True, True] * 2
    assert capsys.readouterr().out.count("s/step") == len(rows)
