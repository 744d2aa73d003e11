"""Atomic writing of files: a reader finds the old file or the complete new one, never a part of one.

Several processes may write into one folder at the same time. A file under construction has a temporary name
and is locked by its process, so that the next writer can tell it from one that a killed process left behind.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

TEMPORARY_SUFFIX = ".tmp"
"""Suffix of a file that is still being written."""
TEMPORARY_PREFIX = ".safe_guidance."
TEMPORARY = re.compile(r"\.(safe_guidance|.+\.(safetensors|latents))\.[a-z0-9_]+\.tmp")
"""Names of temporary files, those of the first version included."""
ABANDONED = 24 * 3600
"""Seconds after which a temporary file is abandoned where files cannot be locked."""
REASONS = {
    errno.ENOSPC: "the disk is full. Free some space and save again",
    errno.EDQUOT: "the disk quota is used up. Free some space and save again",
    errno.EFBIG: "the file is larger than the disk or a limit allows. Save less in one file",
    errno.EROFS: "the folder is read-only. Make it writable, or choose another folder",
    errno.EACCES: "there is no permission to write there. Make the folder writable, or choose another folder",
    errno.EPERM: "there is no permission to write there. Make the folder writable, or choose another folder",
    errno.ENAMETOOLONG: "the name is too long. Choose a shorter one",
    errno.EISDIR: "a folder has that name. Choose another name",
    errno.ENOTDIR: "a part of the name is a file, not a folder. Choose another name",
    errno.ENOTEMPTY: "a folder has that name. Choose another name",
    errno.ELOOP: "links in the folder lead in a circle. Choose another folder",
}
"""Sentences for the errors of the operating system."""


def reason(error: OSError) -> str:
    """Say in words why a file could not be written, and what to do."""
    found = REASONS.get(error.errno or 0)
    return found or f"{error.strerror or 'the disk has an error'}. Check the disk and the folder"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the block ends.

    If the block raises, the new file and the folders made for it are deleted, and the old file stays. A
    process that has the old file open keeps it.

    Raises:
        OSError: the disk is full or read-only, or there is a folder at `path`.
    """
    with _temporary(path.parent) as (file, temporary):
        yield file
        _finish(file)
        os.replace(temporary, path)


def write_new(
    folder: Path,
    names: Iterable[str],
    write: Callable[[BinaryIO], None],
    may_replace: Callable[[Path], bool],
) -> Path:
    """Write a file under the first name that is free in a folder, and return its path.

    Two processes never get the same name, unless the one may replace the other's file.

    Args:
        folder: made if it is missing.
        names: in order of preference.
        write: writes the content.
        may_replace: returns True for a file that has one of the names and may be replaced.

    Raises:
        OSError: the disk is full or read-only, or no name is free. No file is left behind.
    """
    with _temporary(folder) as (file, temporary):
        write(file)
        _finish(file)
        for path in (folder / name for name in names):
            if _claim(temporary, path):
                return path
            if path.is_file() and may_replace(path):
                os.replace(temporary, path)
                return path
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _claim(temporary: Path, path: Path) -> bool:
    """Move a file to a name that no file has; return False if one has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # This file system has no hard links. An empty file claims the name instead.
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(path)
            raise
        return True
    os.unlink(temporary)
    return True


def _finish(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    if sys.platform == "win32":
        # Windows renames no open files.
        file.close()


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a locked temporary file in a folder; delete it unless the block has moved it.

    If the block raises, folders that were made for the file are deleted too.
    """
    missing = _missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        file, temporary = _open_locked(folder)
        try:
            yield file, temporary
        finally:
            with suppress(OSError):
                # Closing writes what is buffered, which fails again on a full disk.
                file.close()
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def _missing_folders(folder: Path) -> list[Path]:
    """Return a folder and those of its parents that do not exist, the innermost first."""
    return list(takewhile(lambda path: not path.is_dir(), (folder, *folder.parents)))


def _open_locked(folder: Path) -> tuple[BinaryIO, Path]:
    """Open a new temporary file that is locked for this process."""
    while True:
        path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        # Not a private file of `tempfile`: the umask decides who may read the result.
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        file = os.fdopen(handle, "wb")
        if sys.platform == "win32":
            return file, path
        with suppress(OSError):
            # Some network drives have no locks. There, age tells what is abandoned.
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return file, path
        # Another process has deleted the file before it was locked.
        file.close()


def remove_abandoned(folder: Path) -> None:
    """Delete the temporary files in a folder whose processes are gone."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(path: Path) -> None:
    if sys.platform == "win32":
        # Windows deletes no file that a process has open.
        path.unlink()
        return
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return
    except OSError:
        if os.fstat(handle).st_mtime < time.time() - ABANDONED:
            path.unlink()
    finally:
        os.close(handle)
