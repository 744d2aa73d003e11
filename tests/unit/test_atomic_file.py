"""Writing of files: several processes, killed ones, full disks, and everything in the way of a name."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from developer_modules import ROOT
from safe_guidance.formats.atomic_file import reason, replacing, write_new

NAMES = ("a", "a_002", "a_003", "a_004", "a_005", "a_006", "a_007", "a_008")
LOAD = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("atomic_file", {str(ROOT / "formats" / "atomic_file.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from pathlib import Path
folder = Path(sys.argv[1])
"""
CLAIM = f"""{LOAD}
sys.stdin.readline()
for turn in range(2):
    content = sys.argv[2].encode() + bytes([turn])
    module.write_new(folder, {NAMES!r}, lambda file: file.write(content), lambda path: False)
"""
HANG = f"""{LOAD}
with module.replacing(folder / "big") as file:
    file.write(bytes(2**20))
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""
LIMITED = f"""{LOAD}
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with module.replacing(folder / "new" / "deeper" / "file") as file:
        file.write(bytes(2**16))
except OSError as error:
    print(module.reason(error))
"""


def start(program: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def write(content: bytes, *names: str, folder: Path, may_replace: bool = False) -> Path:
    def put(file: BinaryIO) -> None:
        file.write(content)

    return write_new(folder, names, put, lambda path: may_replace)


def test_processes_that_save_one_name_all_keep_their_file(tmp_path: Path) -> None:
    processes = [start(CLAIM, tmp_path, str(number)) for number in range(4)]
    for process in processes:
        process.communicate("\n")
        assert process.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == len(NAMES)


def test_names_are_claimed_without_hard_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT and some network drives have none."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert write(b"1", *NAMES, folder=tmp_path).name == "a"
    assert write(b"2", *NAMES, folder=tmp_path).name == "a_002"
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [b"1", b"2"]


def test_a_file_of_the_same_content_is_replaced(tmp_path: Path) -> None:
    assert write(b"1", "a", "b", folder=tmp_path) == write(b"2", "a", "b", folder=tmp_path, may_replace=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"2"]


def test_folders_and_links_in_the_way_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    assert write(b"1", "a", "b", "c", folder=tmp_path, may_replace=True).name == "c"
    with pytest.raises(FileExistsError):
        write(b"1", "a", "b", folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            with replacing(tmp_path / "a") as file:
                file.write(b"1")
            new = write(b"1", f"b{mask}", folder=tmp_path)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode == stat.S_IMODE(new.stat().st_mode)


def test_what_killed_saves_left_goes_at_the_next_save(tmp_path: Path) -> None:
    for _ in range(3):
        process = start(HANG, tmp_path)
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (tmp_path / ".set.safetensors.k3j_x9ab.tmp").write_bytes(b"of the first version")
    (tmp_path / ".other.tmp").write_bytes(b"not ours")
    # Each of them has removed the file of the one before.
    assert len(list(tmp_path.iterdir())) == 1 + 2
    write(b"1", "a", folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".other.tmp"}


def test_a_save_that_is_running_is_left_alone(tmp_path: Path) -> None:
    process = start(HANG, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 1e6,) * 2)
    write(b"1", "a", folder=tmp_path)
    process.communicate("\n")
    assert process.returncode == 0
    assert (tmp_path / "big").stat().st_size == 2**20
    assert {path.name for path in tmp_path.iterdir()} == {"a", "big"}


def test_a_full_disk_leaves_neither_file_nor_folder(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "deeper").mkdir()
    for kept in (True, False):
        if not kept:
            (tmp_path / "new" / "deeper").rmdir()
            (tmp_path / "new").rmdir()
        output, _ = start(LIMITED, tmp_path).communicate()
        assert output.startswith("the file is larger than the disk or a limit allows. ")
        assert [path.name for path in tmp_path.rglob("*")] == (["new", "deeper"] if kept else [])


def test_a_failed_block_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x" / "y" / "z"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [*range(1, 134), None])
def test_every_error_of_the_system_has_a_sentence(code: int | None) -> None:
    error = OSError(code, os.strerror(code)) if code else OSError("odd")
    assert ". " in reason(error) and "\n" not in reason(error) and "Errno" not in reason(error)
