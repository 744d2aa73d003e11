"""The bench of all methods: each is there, acts, and is measured beside the plain run."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def test_every_method_is_measured_and_acts(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from safe_guidance.evaluation.benches import demo_model
    from safe_guidance.nodes.host.engine.hooks import trace_of

    with torch.inference_mode():
        rows = demo_model.measure(2, 1, [4])
        compared = demo_model.contenders(host.model, host.clip, host.vae, [4])
        for contender in compared[1:]:
            samples = host.sample(
                contender.model, contender.positive or host.text(demo_model.PROMPT), steps=3
            )
            trace = trace_of(contender.model, samples)
            if contender.method != "SAFREE":
                assert trace is not None and trace.summary(trace.methods[0]).acted, contender.method
    assert [row.method for row in rows] == [contender.method for contender in compared]
    names = " ".join(row.method for row in rows)
    for method in ("safe_denoiser", "SPELL", "SLD", "Semantic", "DAG", "STG", "SDG", "SAFREE"):
        assert method in names
    assert rows[0].seconds_ratio == 1 and all(row.model_calls_ratio >= 1 for row in rows)
    assert capsys.readouterr().out.count("ms/step") == len(rows)
