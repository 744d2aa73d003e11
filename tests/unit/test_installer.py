"""The installer without a network: names of environments, the lock, installing, unpacking, settings."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from developer_modules import ROOT, installer_module

archive = installer_module("archive")
environment = installer_module("environment")
installation = installer_module("installation")
installed_host = installer_module("installed_host")
lock_files = installer_module("lock_files")
package_indexes = installer_module("package_indexes")
pinned_host = installer_module("pinned_host")

PLENTY = 100 * 1024**3
HOLD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from installer.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), lambda text: print(text, flush=True)):
    print("held", flush=True)
    sys.stdin.read()
"""


def install(folder: Path, *steps: Callable[[Path], None], free: int = PLENTY) -> list[str]:
    reported: list[str] = []
    named = [installation.Step(f"step {number}", step) for number, step in enumerate(steps, start=1)]
    installation.ensure_installed(folder, named, free=lambda _folder: free, report=reported.append)
    return reported


def write(name: str) -> Callable[[Path], None]:
    def step(folder: Path) -> None:
        (folder / name).touch()

    return step


def fail_with(error: BaseException) -> Callable[[Path], None]:
    def step(folder: Path) -> None:
        (folder / "half").touch()
        raise error

    return step


def archive_of(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_the_environment_key_is_stable_and_follows_every_pin() -> None:
    key = pinned_host.environment_key([b"a==1\n", b"b==2\n"], (3, 11), "linux-x86_64")
    assert key == pinned_host.environment_key([b"a==1\r\n", b"b==2\r\n"], (3, 11), "linux-x86_64")
    others = {
        pinned_host.environment_key([b"a==1\n", b"b==3\n"], (3, 11), "linux-x86_64"),
        pinned_host.environment_key([b"a==1\nb==2\n", b""], (3, 11), "linux-x86_64"),
        pinned_host.environment_key([b"a==1\n", b"b==2\n"], (3, 12), "linux-x86_64"),
        pinned_host.environment_key([b"a==1\n", b"b==2\n"], (3, 11), "win-amd64"),
    }
    assert len(others | {key}) == 5


def test_every_lock_file_pins_with_hashes() -> None:
    for lock in (
        lock_files.BOOTSTRAP,
        lock_files.HOST,
        lock_files.HOST_LOWEST,
        lock_files.FRONTEND_NEWEST,
        lock_files.DEVELOPMENT,
        lock_files.TOOLS,
    ):
        entries = [
            line
            for line in lock.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
            if line and line.strip()[0] != "#"
        ]
        assert entries
        assert all("==" in entry and "--hash=sha256:" in entry for entry in entries), lock.name


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        ({"SAFE_GUIDANCE_CACHE": "/there"}, "linux", Path("/there")),
        ({"XDG_CACHE_HOME": "/cache"}, "linux", Path("/cache/safe-guidance")),
        ({}, "linux", Path.home() / ".cache/safe-guidance"),
        ({}, "darwin", Path.home() / "Library/Caches/safe-guidance"),
        ({"LOCALAPPDATA": "/local"}, "win32", Path("/local/safe-guidance")),
    ],
)
def test_cache_folder(environ: dict[str, str], platform: str, expected: Path) -> None:
    assert environment.cache_folder(environ, platform) == expected.absolute()


def test_a_lock_excludes_a_second_process_and_is_released_by_a_killed_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    children: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return children[-1]

    def line(child: subprocess.Popen[str]) -> str:
        assert child.stdout is not None
        return child.stdout.readline().strip()

    try:
        first = start()
        assert line(first) == "held"
        second = start()
        assert line(second) == "waiting for another installation"
        assert second.poll() is None
        first.kill()
        assert line(second) == "held"
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_a_complete_folder_is_not_installed_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    reported = install(folder, write("one"), write("two"))
    assert {path.name for path in folder.iterdir()} == {"one", "two", installation.COMPLETE}
    assert [text for text in reported if text.startswith("[")] == [
        "[1/2] step 1 (0 s so far)",
        "[2/2] step 2 (0 s so far)",
    ]
    assert install(folder, fail_with(AssertionError("installed twice"))) == []


def test_an_interrupted_installation_starts_again(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    with pytest.raises(KeyboardInterrupt):
        install(folder, write("old"), fail_with(KeyboardInterrupt()))
    assert (folder / "half").exists() and not (folder / installation.COMPLETE).exists()
    assert "removing an unfinished installation" in install(folder, write("new"))
    assert {path.name for path in folder.iterdir()} == {"new", installation.COMPLETE}


def test_an_unusable_installation_starts_again(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    install(folder, write("one"))
    installation.ensure_installed(
        folder,
        [installation.Step("again", write("two"))],
        lambda _folder: False,
        lambda _folder: PLENTY,
        lambda _text: None,
    )
    assert {path.name for path in folder.iterdir()} == {"two", installation.COMPLETE}


def test_a_small_disk_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        environment.SetupError,
        match=r"needs about 9 GB, .* has 1\.0 GB left\. Free some space .*SAFE_GUIDANCE_CACHE",
    ):
        install(tmp_path / "key", fail_with(AssertionError("started")), free=1024**3)
    assert not (tmp_path / "key").exists()


def test_a_disk_that_fills_up_is_reported_and_cleaned(tmp_path: Path) -> None:
    with pytest.raises(environment.SetupError, match="needs about 9 GB"):
        install(tmp_path / "key", fail_with(OSError(errno.ENOSPC, "No space left on device")))
    assert not (tmp_path / "key").exists()


def test_a_package_installer_that_fills_the_disk_is_reported(tmp_path: Path) -> None:
    rooms = iter([PLENTY, 1024])
    step = installation.Step("packages", fail_with(subprocess.CalledProcessError(2, ["uv"])))
    with pytest.raises(environment.SetupError, match="needs about 9 GB"):
        installation.ensure_installed(
            tmp_path / "key", [step], free=lambda _folder: next(rooms), report=lambda _text: None
        )


def test_a_failing_package_installer_is_reported_and_cleaned(tmp_path: Path) -> None:
    with pytest.raises(
        environment.SetupError, match="failed at the step 'step 1': .*status 2.* start the command again"
    ):
        install(tmp_path / "key", fail_with(subprocess.CalledProcessError(2, ["uv"])))
    assert not (tmp_path / "key").exists()


def test_only_the_host_is_unpacked(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {
        "pack-1/vendor/ComfyUI/main.py": b"main",
        "pack-1/vendor/ComfyUI/comfy/sd.py": b"sd",
        "pack-1/README.md": b"",
    }
    archive.unpack_host(archive_of(tmp_path / "a.tar.gz", members), tmp_path / "host")
    found = {
        path.relative_to(tmp_path / "host").as_posix(): path.read_bytes()
        for path in (tmp_path / "host").rglob("*.py")
    }
    assert found == {"main.py": b"main", "comfy/sd.py": b"sd"}
    assert not list(tmp_path.rglob("README.md"))


@pytest.mark.parametrize(
    "member",
    [
        "pack-1/vendor/ComfyUI/../../../escaped",
        "/vendor/ComfyUI/escaped",
        "../escaped",
        "pack-1/vendor/ComfyUI/..\\escaped",
        "pack-1/vendor/ComfyUI/C:escaped",
    ],
)
def test_unpacking_rejects_paths_outside_its_folder(tmp_path: Path, member: str) -> None:
    with pytest.raises(environment.SetupError, match="leaves its folder"):
        archive.unpack_host(archive_of(tmp_path / "a.tar.gz", {member: b"!"}), tmp_path / "inner" / "host")
    assert not list(tmp_path.rglob("*escaped*"))


def test_unpacking_rejects_links_and_an_archive_without_a_host(tmp_path: Path) -> None:
    with pytest.raises(environment.SetupError, match="not a plain file"):
        archive.unpack_host(
            archive_of(tmp_path / "a.tar.gz", {"pack-1/vendor/ComfyUI/link": "/etc/passwd"}),
            tmp_path / "host",
        )
    with pytest.raises(environment.SetupError, match="contains no ComfyUI"):
        archive.unpack_host(archive_of(tmp_path / "b.tar.gz", {"pack-1/README.md": b""}), tmp_path / "host")


def test_pip_settings_take_the_highest_rank() -> None:
    text = "\n".join(
        [
            ":env:.index-url='file:///mirror'",
            "global.index-url='file:///global'",
            "global.extra-index-url='\\nfile:///one\\nfile:///two'",
            "install.find-links='/wheels /more'",
            "global.find-links='/other'",
            "download.cert='/not/for/install'",
        ]
    )
    expected = {
        "index-url": "file:///mirror",
        "extra-index-url": "file:///one file:///two",
        "find-links": "/wheels /more",
    }
    assert package_indexes.parse_pip_settings(text) == expected


def test_uv_uses_the_indexes_of_pip() -> None:
    settings = {
        "index-url": "file:///mirror",
        "extra-index-url": "file:///one file:///two",
        "find-links": "/a /b",
        "cert": "/ca.pem",
    }
    assert package_indexes.index_settings(settings, {"SSL_CERT_FILE": "/mine.pem"}) == {
        "UV_DEFAULT_INDEX": "file:///mirror",
        "UV_INDEX": "file:///one file:///two",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/a,/b",
    }
    assert package_indexes.index_settings(settings, {"UV_INDEX_URL": "file:///own"}).keys() == {
        "UV_FIND_LINKS",
        "SSL_CERT_FILE",
    }
    assert package_indexes.index_settings({}, {}) == {}


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    host = tmp_path / "ComfyUI"
    (host / "comfy").mkdir(parents=True)
    (host / "main.py").touch()
    return host


def test_installed_comfyui_is_used_with_its_interpreter(comfyui: Path) -> None:
    assert installed_host.installed_host({}) is None
    assert installed_host.installed_host({"COMFYUI_PATH": str(comfyui)}) == environment.Environment(
        Path(sys.executable), comfyui
    )
    own = environment.interpreter(comfyui / ".venv")
    own.parent.mkdir(parents=True)
    own.touch()
    assert installed_host.installed_host({"COMFYUI_PATH": str(comfyui)}).python == own
    chosen = {"COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": sys.executable}
    assert installed_host.installed_host(chosen).python == Path(sys.executable)


def test_wrong_comfyui_paths_are_reported(comfyui: Path, tmp_path: Path) -> None:
    with pytest.raises(environment.SetupError, match=r"there is no ComfyUI there\. Set it"):
        installed_host.installed_host({"COMFYUI_PATH": str(tmp_path)})
    with pytest.raises(environment.SetupError, match=r"there is no such file\. Set it"):
        installed_host.installed_host(
            {"COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": str(tmp_path / "python")}
        )


def test_missing_modules_are_named_with_their_remedy() -> None:
    installed_host.check_modules(Path(sys.executable), ("json",), "")
    with pytest.raises(
        environment.SetupError, match=r"lacks no_such_module_a, no_such_module_b\. Install them"
    ):
        installed_host.check_modules(
            Path(sys.executable), ("json", "no_such_module_a", "no_such_module_b"), "Install them"
        )


def test_the_command_line_starts_without_any_package() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dev"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)
