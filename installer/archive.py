"""Unpacking of the archive that contains the test host's ComfyUI."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path, PurePosixPath

from .environment import SetupError
from .lock_files import HOST

ARCHIVE_FOLDER = ("vendor", "ComfyUI")


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
