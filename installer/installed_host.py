"""The installed ComfyUI that COMFYUI_PATH names, and the modules that a command needs in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .environment import Environment, SetupError, interpreter
from .lock_files import TOOLS

TOOL_MODULES = ("pytest", "pytest_timeout", "hypothesis", "ruff", "mypy")
LIST_MISSING_MODULES = """
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
"""


def installed_host(environ: Mapping[str, str]) -> Environment | None:
    """Return the ComfyUI that COMFYUI_PATH names, with its interpreter, or None when the variable is not set.

    Raises SetupError when there is no ComfyUI or no interpreter at the given paths.
    """
    if not environ.get("COMFYUI_PATH"):
        return None
    host = Path(environ["COMFYUI_PATH"]).expanduser().absolute()
    if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
        raise SetupError(
            f"COMFYUI_PATH is {host}, and there is no ComfyUI there. "
            "Set it to the folder that contains ComfyUI's main.py."
        )
    if environ.get("COMFYUI_PYTHON"):
        python = Path(environ["COMFYUI_PYTHON"]).expanduser().absolute()
        if not python.is_file():
            raise SetupError(
                f"COMFYUI_PYTHON is {python}, and there is no such file. "
                "Set it to the interpreter that runs your ComfyUI."
            )
        return Environment(python, host)
    usual = (
        interpreter(host / "venv"),
        interpreter(host / ".venv"),
        host.parent / "python_embeded" / "python.exe",
    )
    return Environment(next((path for path in usual if path.is_file()), Path(sys.executable)), host)


def check_modules(python: Path, modules: Sequence[str], remedy: str) -> None:
    """Raise SetupError when an interpreter lacks one of the modules."""
    command = [str(python), "-I", "-c", LIST_MISSING_MODULES, *modules]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetupError(
            f"{python} does not run: {result.stderr.strip()}. "
            "Set COMFYUI_PYTHON to the interpreter that runs your ComfyUI."
        )
    if result.stdout.strip():
        raise SetupError(f"{python} lacks {', '.join(result.stdout.split())}. {remedy}")


def check_installed_host(environment: Environment, command: str) -> None:
    """Raise SetupError when an installed ComfyUI lacks what a command needs."""
    python = environment.python
    check_modules(
        python, ("torch", "aiohttp"), "Set COMFYUI_PYTHON to the interpreter that runs your ComfyUI."
    )
    if command == "test":
        check_modules(python, TOOL_MODULES, f'Install them with: "{python}" -m pip install -r "{TOOLS}"')
