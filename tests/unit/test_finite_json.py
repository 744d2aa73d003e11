"""JSON of files: every number in it is finite."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_guidance.formats import finite_json, tensor_file
from safe_guidance.reports.trace_file import trace_from_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values)
@settings(deadline=None)
def test_finite_json_is_read_as_it_is(value: Any) -> None:
    assert finite_json.loads(json.dumps(value)) == value


@given(json_values, st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "-1e400"]))
@settings(deadline=None)
def test_numbers_that_are_not_finite_are_refused_anywhere(value: Any, wrong: str) -> None:
    text = json.dumps({"a": [value, {"b": math.pi}]}).replace(str(math.pi), wrong)
    with pytest.raises(ValueError):
        finite_json.loads(text)
    assert tensor_file.parsed(text) is None
    with pytest.raises(ValueError, match="not a safety trace"):
        trace_from_json(text, "trace.json")
