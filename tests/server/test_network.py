"""The server of the tests is watched: `tests/conftest.py` fails the run if it reaches another machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def test_the_server_is_watched(server: Any) -> None:
    records = Path(os.environ["SAFE_GUIDANCE_NETWORK_RECORDS"])
    assert (records / f"{server.process.pid}.txt").read_text() == ""
