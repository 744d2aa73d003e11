"""A lock between processes, which the operating system releases when its holder dies."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .environment import say


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
