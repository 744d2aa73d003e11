"""An environment: a ComfyUI and the Python interpreter that runs it. Standard library only."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


class SetupError(Exception):
    """Error of an environment that is missing or not usable. Its message says why and what to do."""


@dataclass(frozen=True)
class Environment:
    """A Python interpreter with the packages of a ComfyUI, and the folder of that ComfyUI."""

    python: Path
    host: Path


def say(text: str) -> None:
    """Write a line to stderr; stdout is kept for results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def cache_folder(environ: Mapping[str, str], platform: str) -> Path:
    """Return the folder for everything that is installed.

    It is SAFE_GUIDANCE_CACHE if that is set, else a folder in the user's cache of this platform.
    """
    if environ.get("SAFE_GUIDANCE_CACHE"):
        return Path(environ["SAFE_GUIDANCE_CACHE"]).expanduser().absolute()
    if platform == "win32":
        base = Path(environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "safe-guidance"


def interpreter(venv: Path) -> Path:
    """Return the path of a virtual environment's Python interpreter."""
    return venv / "Scripts" / "python.exe" if sys.platform == "win32" else venv / "bin" / "python"


def clean_environ() -> dict[str, str]:
    """Return this process's environment variables without those that make other packages importable."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
