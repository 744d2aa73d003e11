"""One check of every number that any node of the pack receives, against the limits of its schema.

The host compares the value of a widget with its limits, which a NaN passes, and does not check linked values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from .host.engine.node_messages import errors_shown_at, executing_node

Limits = Mapping[str, tuple[float | None, float | None]]
"""Smallest and largest value of every numeric input by its id."""


def limits_of(schema: io.Schema) -> Limits:
    """Return the limits of a node's whole and decimal numbers."""
    numbers = [each for each in schema.inputs if isinstance(each, io.Int.Input | io.Float.Input)]
    return {number.id: (number.min, number.max) for number in numbers}


def check_numbers(values: Mapping[str, Any], limits: Limits) -> None:
    """Check the values of a node's numeric inputs; absent optional ones are None.

    Raises:
        ValueError: a value is no finite number, or outside its limits.
    """
    for name, (least, most) in limits.items():
        value = values.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"'{name}' is {_shown(value)}, which is no finite number. {_advice(least, most)}"
            )
        if (least is not None and value < least) or (most is not None and value > most):
            raise ValueError(f"'{name}' is {_shown(value)}, which is out of range. {_advice(least, most)}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)[:40]


def _advice(least: float | None, most: float | None) -> str:
    return f"Set a number from {least} to {most}." if None not in (least, most) else "Set a number."


def with_checked_numbers(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Make a node class check its numbers before it executes; return the class."""
    execute = vars(node)["execute"].__func__
    if getattr(execute, "checks_numbers", False):
        return node
    limits = functools.cache(lambda: limits_of(node.define_schema()))

    @functools.wraps(execute)
    def check_and_execute(cls: type[io.ComfyNode], *inputs: Any, **named: Any) -> io.NodeOutput:
        with errors_shown_at(executing_node()):
            check_numbers(named, limits())
        output: io.NodeOutput = execute(cls, *inputs, **named)
        return output

    check_and_execute.checks_numbers = True  # type: ignore[attr-defined]
    node.execute = classmethod(check_and_execute)  # type: ignore[method-assign, assignment]
    return node
