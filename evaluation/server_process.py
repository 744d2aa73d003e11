"""The parts of starting and stopping a server that depend on the operating system."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from .server_errors import ServerError

PR_SET_PDEATHSIG = 1

STOP_SECONDS = 20.0


@functools.lru_cache
def has_cuda(python: Path) -> bool:
    """Return True when the torch of an interpreter can use a GPU through CUDA."""
    program = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([python, "-c", program], capture_output=True, check=False).returncode == 0


def link_folder(link: Path, target: Path) -> None:
    """Make a folder available under another path: by a symbolic link, or by a junction on Windows.

    Raises ServerError when another file or folder has that path.
    """
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        try:
            # This removes a junction and fails on a folder with contents.
            link.rmdir()
        except OSError as error:
            raise ServerError(f"{link} already exists and is not a link. Move it away.") from error
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if (
            sys.platform != "win32"
            or subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=False).returncode
        ):
            raise


def free_port() -> int:
    """Find a TCP port of the loopback interface that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_options() -> dict[str, Any]:
    """Return options of Popen that put the server into a process group of its own.

    So only `stop_process` interrupts it, and not the terminal's Ctrl-C.
    """
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    else:
        # mypy takes a nested function out of the dead code of a platform only inside a branch.
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        parent, death = os.getpid(), signal.SIGKILL

        def prepare() -> None:
            # A shell starts background jobs with this signal ignored, and then the server would not stop on
            # it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if prctl is not None:
                prctl(PR_SET_PDEATHSIG, death)
                # The parent may have died before the request.
                if os.getppid() != parent:
                    os._exit(1)

        return {"start_new_session": True, "preexec_fn": prepare}


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to stop, as Ctrl-C in its terminal would."""
    if sys.platform == "win32":
        process.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        process.send_signal(signal.SIGINT)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Stop a server, and kill it if it does not stop in time."""
    if process.poll() is None:
        _interrupt(process)
    try:
        process.wait(STOP_SECONDS)
    except BaseException as error:
        process.kill()
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
