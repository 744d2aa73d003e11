"""Further hosts that the tests run on: the lowest ComfyUI that the pack claims, and the newest web interface.

Both use the packages of the test host. Each is installed once, beside it.
"""

from __future__ import annotations

import argparse
import shutil
import zipfile
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from .environment import Environment
from .installation import NEEDED_BYTES, Step, ensure_installed, free_bytes
from .lock_files import FRONTEND_NEWEST, HOST_LOWEST
from .pinned_host import download, environment_key, fetch_comfyui

PINNED, LOWEST, NEWEST_FRONTEND = "pinned", "lowest", "newest-frontend"
LEGS = (PINNED, LOWEST, NEWEST_FRONTEND)
FRONTEND_VARIABLE = "SAFE_GUIDANCE_FRONTEND"
"""Environment variable with the folder of a web interface that the servers of the tests use."""
LEG_TESTS = {
    LOWEST: (
        "tests/host/test_demo_model.py",
        "tests/host/test_message_gate.py",
        "tests/host/test_node_messages.py",
        "tests/host/test_diagnostics.py",
        "tests/server/test_bad_input.py",
        "tests/server/test_hostile_texts.py",
        "tests/server/test_workflows.py",
    ),
    NEWEST_FRONTEND: ("tests/browser",),
}
"""Tests that `test --host` runs when it names none."""
STATIC = "comfyui_frontend_package/static/"


def split_leg(command: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the host that `test --host` names and the other arguments; without others, those of the host."""
    parser = argparse.ArgumentParser(prog=f"dev.py {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--host", choices=LEGS, default=PINNED)
    if command != "test":
        return PINNED, list(arguments)
    found, rest = parser.parse_known_args(list(arguments))
    return str(found.host), rest or list(LEG_TESTS.get(found.host, ()))


def leg_environment(
    leg: str, cache: Path, pinned: Environment, environ: MutableMapping[str, str]
) -> Environment:
    """Return the environment of a leg, and name its web interface in `environ`. Raises SetupError."""
    if leg == NEWEST_FRONTEND:
        environ[FRONTEND_VARIABLE] = str(newest_frontend(cache, pinned))
    return lowest_host(cache, pinned) if leg == LOWEST else pinned


def lowest_host(cache: Path, pinned: Environment) -> Environment:
    """Return the lowest ComfyUI with the test host's packages; install it if needed. Raises SetupError."""

    def fetch(folder: Path) -> None:
        fetch_comfyui(pinned.python, HOST_LOWEST, folder)

    folder = _installed(cache, HOST_LOWEST, Step("downloading ComfyUI", fetch))
    return Environment(pinned.python, folder / "ComfyUI")


def newest_frontend(cache: Path, pinned: Environment) -> Path:
    """Return the folder of the newest web interface; install it if needed. Raises SetupError."""

    def fetch(folder: Path) -> None:
        archive = download(pinned.python, FRONTEND_NEWEST, folder / "download", "--only-binary")
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(STATIC)])
        shutil.rmtree(folder / "download")

    return _installed(cache, FRONTEND_NEWEST, Step("downloading the web interface", fetch)) / STATIC


def _installed(cache: Path, lock: Path, step: Step) -> Path:
    """Return the folder of what a lock file pins, installed."""
    folder = cache / f"{lock.stem}-{environment_key([lock.read_bytes()], (0, 0), '')}"
    # The check of the disk is for the test host. This takes 150 MB.
    ensure_installed(folder, [step], free=lambda path: free_bytes(path) + NEEDED_BYTES)
    return folder
