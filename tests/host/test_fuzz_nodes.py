"""Hostile numbers and texts at every node: an answer, or one clear error."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from safe_guidance.evaluation.fuzz import node_inputs

SMALL = 4
"""Inputs of each node. `dev.py fuzz` makes any number."""


def test_every_node_answers_or_refuses_clearly(host: Any) -> None:
    objects = node_inputs.Objects()
    nodes = objects.fuzzed()
    assert len(nodes) > 20
    for node in nodes.values():
        check(node, node_inputs.inputs(node, objects.defaults(node)))


def check(node: Any, given_inputs: st.SearchStrategy[dict[str, Any]]) -> None:
    @seed(5)
    @settings(max_examples=SMALL, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(given_inputs)
    def one(inputs: dict[str, Any]) -> None:
        node_inputs.answer(node, inputs)

    one()
