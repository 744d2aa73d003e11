"""dev.py and the package installer, loaded by path because the root is not on sys.path."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load(name: str, file: Path) -> ModuleType:
    """Load a module or a package of the repository's root."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def installer_module(name: str) -> ModuleType:
    """Import a module of the package installer."""
    return importlib.import_module(f"installer.{name}")


load("installer", ROOT / "installer" / "__init__.py")
dev = load("dev", ROOT / "dev.py")
