"""Lists that people type: bounded, and every mistake is a clear error."""

from __future__ import annotations

import importlib.util
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from developer_modules import ROOT

# The package of the nodes needs the host; this module of it does not.
spec = importlib.util.spec_from_file_location("safe_guidance.nodes.parsing", ROOT / "nodes" / "parsing.py")
assert spec is not None and spec.loader is not None
parsing = importlib.util.module_from_spec(spec)
sys.modules.setdefault(spec.name, parsing)
spec.loader.exec_module(parsing)


def test_noise_levels_are_sorted_and_unique() -> None:
    assert parsing.noise_levels("1, 7;3, 3.0") == (7, 3, 1)


@pytest.mark.parametrize(
    "text", ["", "a", "1,nan", "inf", "-1", "0", "1e7", "1_0", "1" * 5000, "1,\ud800", "9" * 200_000]
)
def test_what_is_no_list_of_noise_levels_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of noise levels. Write positive numbers") as raised:
        parsing.noise_levels(text)
    assert len(str(raised.value)) < 300


def test_very_long_lists_are_refused_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="more than 100 entries"):
        parsing.noise_levels(", ".join(map(str, range(1, 200_001))))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("text", ["a", "-1", "1.5", str(2**64), "9" * 5000, "\ud800"])
def test_what_is_no_list_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of seeds. Write whole numbers") as raised:
        parsing.seeds_of(text, 0, 3)
    assert len(str(raised.value)) < 300


@given(st.text(st.characters(codec=None)))
def test_any_text_is_a_list_or_a_clear_error(text: str) -> None:
    for read in (parsing.noise_levels, lambda text: parsing.seeds_of(text, 5, 3)):
        try:
            assert read(text)
        except ValueError as error:
            assert "is not a list of" in str(error)
