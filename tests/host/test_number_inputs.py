"""Every number of every node is checked against its schema, also where the host lets it pass."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


@pytest.fixture(scope="module")
def registered(host: Any) -> list[Any]:
    """All nodes as the host gets them."""
    from safe_guidance.nodes.extension import SafeGuidanceExtension

    nodes: list[Any] = asyncio.run(SafeGuidanceExtension().get_node_list())
    return nodes


def test_every_number_of_every_node_is_refused_when_it_is_not_finite_or_out_of_range(
    registered: list[Any], shown: dict[str, str]
) -> None:
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.nodes.number_inputs import limits_of

    checked = 0
    for node in registered:
        for name, (least, most) in limits_of(node.define_schema()).items():
            assert least is not None and most is not None, f"{node.__name__}: {name} has no limits"
            wrong = [math.nan, math.inf, -math.inf, least - 1, most + max(1, most * 1e-3), "nan", [1.0], {}]
            for value in wrong:
                with (
                    CurrentNodeContext("prompt", "4"),
                    pytest.raises(ValueError, match=f"^'{name}' is .*Set a number"),
                ):
                    node.EXECUTE_NORMALIZED(**{name: value})
                assert shown["4"].startswith(f"'{name}' is ")
                checked += 1
    assert checked > 8 * 50


def test_limits_themselves_and_absent_optional_values_pass(registered: list[Any]) -> None:
    from safe_guidance.nodes.number_inputs import check_numbers, limits_of

    for node in registered:
        limits = limits_of(node.define_schema())
        for bound in (0, 1):
            check_numbers({name: pair[bound] for name, pair in limits.items()}, limits)
        check_numbers(dict.fromkeys(limits), limits)
        check_numbers({}, limits)


def test_wrapping_twice_checks_once(registered: list[Any]) -> None:
    from safe_guidance.nodes.number_inputs import with_checked_numbers

    before = registered[0].execute.__func__
    assert with_checked_numbers(registered[0]).execute.__func__ is before


def test_a_change_that_is_not_finite_is_told_as_a_change(host: Any, shown: dict[str, str]) -> None:
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.guidance.core.composition import Change
    from safe_guidance.nodes.host.engine.correction import Correction, Step
    from safe_guidance.nodes.host.engine.hooks import attach, trace_of
    from safe_guidance.reports.trace import Trace

    class Ruinous(Correction):
        name = "Ruinous"

        def is_active(self, level: Any) -> bool:
            return True

        def correct(self, step: Step, state: Any) -> Change:
            return Change(torch.full_like(step.denoised, math.nan), step.every_row)

    with CurrentNodeContext("prompt", "3"):
        model = attach(host.model, Ruinous())
    samples = host.sample(model, host.text("a yellow star"), steps=2)
    assert "Ruinous acted at 2 of 2 model calls and made values that are not finite" in shown["3"]
    trace = trace_of(model, samples)
    assert trace is not None and trace.summary("Ruinous").acted == 2
    assert Trace.from_dict(trace.to_dict()) == trace
