"""Installation of a folder in steps: once, by one process at a time, and removed when a step fails."""

from __future__ import annotations

import errno
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .environment import SetupError, say
from .lock import exclusive_lock

NEEDED_BYTES = 9 * 1024**3
FULL_DISK_BYTES = 256 * 1024**2
COMPLETE = "complete"


@dataclass(frozen=True)
class Step:
    """One step of an installation: its title, and the function that writes into the given folder."""

    title: str
    run: Callable[[Path], None]


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder."""
    return shutil.disk_usage(folder).free


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


def disk_full(folder: Path, free: int) -> SetupError:
    """Return the error for a disk with too little free space."""
    return SetupError(
        f"The test host needs about {NEEDED_BYTES / 1024**3:.0f} GB, and the disk of {folder} has "
        f"{free / 1024**3:.1f} GB left. Free some space (older environments in that folder may be deleted), "
        "or set SAFE_GUIDANCE_CACHE to a folder on a larger disk."
    )
