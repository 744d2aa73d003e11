"""JSON whose numbers are finite: what JSON's standard allows, and Python's reader does not insist on."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def loads(text: str) -> Any:
    """Parse JSON.

    Raises:
        json.JSONDecodeError: it is not JSON, or a number in it is NaN, infinite or too large for a float.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(constant: str) -> NoReturn:
    raise json.JSONDecodeError("no number of JSON", constant, 0)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise json.JSONDecodeError("too large a number", digits, 0)
    return number
