"""Loads the pack under its own name, and provides the host: in this process, and as a server."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _load_pack() -> None:
    # The root is itself the package, and its folder `nodes` bears the name of a module of the host: it must not be on sys.path.
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]
    spec = importlib.util.spec_from_file_location("safe_guidance", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["safe_guidance"] = module
    spec.loader.exec_module(module)


_load_pack()
