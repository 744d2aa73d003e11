#!/usr/bin/env python3
"""Command line for developers: demo, test, serve, bench, fuzz, soak, study and make, with a real ComfyUI.

On a fresh machine it first installs a test host (see installer/). With COMFYUI_PATH it uses an installed
ComfyUI instead. Standard library only, because nothing else is installed yet when it starts.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from installer.environment import Environment, SetupError, cache_folder, clean_environ, say
from installer.installed_host import check_installed_host, installed_host
from installer.legs import PINNED, leg_environment, split_leg
from installer.pinned_host import test_host

ROOT = Path(__file__).resolve().parent
PACKAGE = "safe_guidance"
INSIDE = "--inside-the-environment"
HOST_VARIABLE = "SAFE_GUIDANCE_HOST"


def load_pack() -> ModuleType:
    """Load the repository as the package `safe_guidance`.

    The root never goes onto sys.path: its folder `nodes` would hide the host's module of that name.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} cannot be loaded as a package.")
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = pack
    spec.loader.exec_module(pack)
    return pack


def keep_root_off_path() -> None:
    """Take the repository's root off sys.path, where Python puts the folder of the script that it runs."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def run_module(name: str, arguments: Sequence[str]) -> int:
    """Run `main(arguments)` of a module of the pack and return its exit code."""
    load_pack()
    return int(importlib.import_module(f"{PACKAGE}.{name}").main(list(arguments)))


def run_tests(arguments: Sequence[str]) -> int:
    """Run the linters and then pytest; stop at the first that fails and return its exit code."""
    checks = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))
    for check in checks:
        say(f"$ {' '.join(check)}")
        code = subprocess.run([sys.executable, "-m", *check], cwd=ROOT, check=False).returncode
        if code:
            return code
    os.chdir(ROOT)
    import pytest

    say(f"$ pytest {' '.join(arguments)}")
    return int(pytest.main(list(arguments)))


def serve(arguments: Sequence[str]) -> int:
    """Run ComfyUI with this pack and its web interface until Ctrl-C; the user's files stay in the cache."""
    load_pack()
    server_module = importlib.import_module(f"{PACKAGE}.evaluation.server")
    base = cache_folder(os.environ, sys.platform) / "serve"
    try:
        with server_module.ComfyServer(base=base) as server:
            example_inputs = importlib.import_module(f"{PACKAGE}.evaluation.example_inputs")
            example_inputs.write_example_images(server.base / "input")
            say(f"files  {server.base}\nlog    {server.log}\nstop   Ctrl-C")
            sys.stdout.write(server.url + "\n")
            sys.stdout.flush()
            return int(server.wait())
    except KeyboardInterrupt:
        say("stopped")
        return 0


GENERATED = ("locales", "images", "workflows", "layout", "brand", "screenshots", "overview")
STUDIES = (
    "detect_and_guide",
    "dag_token_sources",
    "memorisation",
    "negation_set_meaning",
    "safe_denoiser",
    "stg_ablation",
    "stg_detectors",
    "stg_effect",
    "stg_gate",
    "stg_toy",
)


def parse_name(command: str, choices: Sequence[str], arguments: Sequence[str]) -> str:
    """Parse the first argument of a command, which is one of the choices."""
    parser = argparse.ArgumentParser(prog=f"dev.py {command}", description=COMMANDS[command][0])
    parser.add_argument("name", choices=choices)
    return str(parser.parse_args(arguments[:1]).name)


def run_chosen(command: str, folder: str, choices: Sequence[str], arguments: Sequence[str]) -> int:
    """Run the module of a folder of the pack that the first argument names, with the further arguments."""
    name = parse_name(command, choices, arguments)
    return run_module(f"{folder}.{name}", arguments[1:])


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "demo": (
        "run the workflows of the methods on the demo model and write before/after images",
        partial(run_module, "evaluation.demo"),
    ),
    "test": ("run the linters and all tests; further arguments go to pytest", run_tests),
    "serve": ("start ComfyUI with this pack and its web interface", serve),
    "bench": (
        "measure each method against the plain KSampler",
        partial(run_module, "evaluation.benches.cli"),
    ),
    "fuzz": (
        "give hostile files, numbers and texts to every reader and node",
        partial(run_module, "evaluation.fuzz.cli"),
    ),
    "soak": (
        "sample the same images many times: bit-identical, and in the same memory",
        partial(run_module, "evaluation.soak"),
    ),
    "study": (
        "run a study behind the fidelity pages",
        partial(run_chosen, "study", "evaluation.studies", STUDIES),
    ),
    "make": (
        "remake generated files: translations, images, workflows",
        partial(run_chosen, "make", "tools", GENERATED),
    ),
}


def _exit_on_sigterm(number: int, _frame: FrameType | None) -> NoReturn:
    # An exception, unlike the default, lets servers be stopped and temporary folders be removed.
    sys.exit(128 + number)


def inside(arguments: Sequence[str]) -> int:
    """Run a command; this process is the environment's interpreter."""
    keep_root_off_path()
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    _, run = COMMANDS[arguments[0]]
    return run(arguments[1:])


def parse(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command line into the command and its arguments, which belong to the command untouched."""
    parser = argparse.ArgumentParser(prog="dev.py", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (description, _) in COMMANDS.items():
        commands.add_parser(name, help=description, description=description, add_help=name == "serve")
    if argv[:1] == ["serve"]:
        parser.parse_args(argv)
    return str(parser.parse_args(argv[:1]).command), list(argv[1:])


def find_environment(command: str, leg: str = PINNED) -> Environment:
    """Return the ComfyUI that COMFYUI_PATH names for a command, else a test host. Raises SetupError."""
    environment = installed_host(os.environ)
    if environment is None:
        cache = cache_folder(os.environ, sys.platform)
        return leg_environment(leg, cache, test_host(cache), os.environ)
    check_installed_host(environment, command)
    return environment


def enter(environment: Environment, arguments: Sequence[str]) -> int:
    """Run this file again with the environment's interpreter and return its exit code.

    On POSIX the new process replaces this one.
    """
    command = [str(environment.python), str(ROOT / "dev.py"), INSIDE, *arguments]
    environ = clean_environ() | {HOST_VARIABLE: str(environment.host)}
    if sys.platform == "win32":
        with subprocess.Popen(command, env=environ) as process:
            # Ctrl-C reaches every process of the console; the child decides what it means.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return process.wait()
    sys.stdout.flush()
    os.execve(command[0], command, environ)


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    if argv[:1] == [INSIDE]:
        return inside(argv[1:])
    command, arguments = parse(argv)
    try:
        leg, arguments = split_leg(command, arguments)
        environment = find_environment(command, leg)
    except SetupError as error:
        say(str(error))
        return 1
    return enter(environment, [command, *arguments])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
