"""dev.py without a network: names of environments, the lock, installing, unpacking, settings."""

from __future__ import annotations

import errno
import importlib.util
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

DEV = Path(__file__).resolve().parents[2] / "dev.py"
PLENTY = 100 * 1024**3
LOAD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("dev_in_child", {str(DEV)!r})
dev = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = dev
spec.loader.exec_module(dev)
from pathlib import Path
"""
HOLD = f"""{LOAD}
with dev.exclusive_lock(Path(sys.argv[1]), lambda text: print(text, flush=True)):
    print("held", flush=True)
    sys.stdin.read()
"""


def load_dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("safe_guidance_dev", DEV)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


dev = load_dev()


def install(folder: Path, *steps: Callable[[Path], None], free: int = PLENTY) -> list[str]:
    told: list[str] = []
    named = [dev.Step(f"step {number}", step) for number, step in enumerate(steps, start=1)]
    dev.ensure_installed(folder, named, free=lambda _folder: free, report=told.append)
    return told


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


def test_key_is_stable_and_follows_every_pin() -> None:
    key = dev.environment_key([b"a==1\n", b"b==2\n"], (3, 11), "linux-x86_64")
    assert key == dev.environment_key([b"a==1\r\n", b"b==2\r\n"], (3, 11), "linux-x86_64")
    others = {
        dev.environment_key([b"a==1\n", b"b==3\n"], (3, 11), "linux-x86_64"),
        dev.environment_key([b"a==1\nb==2\n", b""], (3, 11), "linux-x86_64"),
        dev.environment_key([b"a==1\n", b"b==2\n"], (3, 12), "linux-x86_64"),
        dev.environment_key([b"a==1\n", b"b==2\n"], (3, 11), "win-amd64"),
    }
    assert len(others | {key}) == 5


def test_every_lock_pins_with_hashes() -> None:
    for lock in (dev.BOOTSTRAP, dev.HOST, dev.DEVELOPMENT, dev.TOOLS):
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
    assert dev.cache_folder(environ, platform) == expected.absolute()


def test_lock_excludes_a_second_process_and_is_released_by_a_killed_one(tmp_path: Path) -> None:
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


def test_installs_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    told = install(folder, write("one"), write("two"))
    assert {path.name for path in folder.iterdir()} == {"one", "two", dev.COMPLETE}
    assert [text for text in told if text.startswith("[")] == [
        "[1/2] step 1 (0 s so far)",
        "[2/2] step 2 (0 s so far)",
    ]
    assert install(folder, fail_with(AssertionError("installed twice"))) == []


def test_interrupted_installation_begins_again(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    with pytest.raises(KeyboardInterrupt):
        install(folder, write("old"), fail_with(KeyboardInterrupt()))
    assert (folder / "half").exists() and not (folder / dev.COMPLETE).exists()
    assert "removing an unfinished installation" in install(folder, write("new"))
    assert {path.name for path in folder.iterdir()} == {"new", dev.COMPLETE}


def test_unusable_installation_begins_again(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    install(folder, write("one"))
    dev.ensure_installed(
        folder,
        [dev.Step("again", write("two"))],
        lambda _folder: False,
        lambda _folder: PLENTY,
        lambda _text: None,
    )
    assert {path.name for path in folder.iterdir()} == {"two", dev.COMPLETE}


def test_small_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        dev.SetupError, match=r"needs about 9 GB, .* has 1\.0 GB left\. Free some space .*SAFE_GUIDANCE_CACHE"
    ):
        install(tmp_path / "key", fail_with(AssertionError("started")), free=1024**3)
    assert not (tmp_path / "key").exists()


def test_disk_that_fills_up_is_told_and_cleaned(tmp_path: Path) -> None:
    with pytest.raises(dev.SetupError, match="needs about 9 GB"):
        install(tmp_path / "key", fail_with(OSError(errno.ENOSPC, "No space left on device")))
    assert not (tmp_path / "key").exists()


def test_installer_that_fills_the_disk_is_told(tmp_path: Path) -> None:
    rooms = iter([PLENTY, 1024])
    step = dev.Step("packages", fail_with(subprocess.CalledProcessError(2, ["uv"])))
    with pytest.raises(dev.SetupError, match="needs about 9 GB"):
        dev.ensure_installed(
            tmp_path / "key", [step], free=lambda _folder: next(rooms), report=lambda _text: None
        )


def test_failing_installer_is_told_and_cleaned(tmp_path: Path) -> None:
    with pytest.raises(
        dev.SetupError, match="failed at the step 'step 1': .*status 2.* start the command again"
    ):
        install(tmp_path / "key", fail_with(subprocess.CalledProcessError(2, ["uv"])))
    assert not (tmp_path / "key").exists()


def test_unpacks_the_host_only(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {
        "pack-1/vendor/ComfyUI/main.py": b"main",
        "pack-1/vendor/ComfyUI/comfy/sd.py": b"sd",
        "pack-1/README.md": b"",
    }
    dev.unpack_host(archive_of(tmp_path / "a.tar.gz", members), tmp_path / "host")
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
def test_unpacking_refuses_to_leave_its_folder(tmp_path: Path, member: str) -> None:
    with pytest.raises(dev.SetupError, match="leaves its folder"):
        dev.unpack_host(archive_of(tmp_path / "a.tar.gz", {member: b"!"}), tmp_path / "inner" / "host")
    assert not list(tmp_path.rglob("*escaped*"))


def test_unpacking_refuses_links_and_an_archive_without_host(tmp_path: Path) -> None:
    with pytest.raises(dev.SetupError, match="not a plain file"):
        dev.unpack_host(
            archive_of(tmp_path / "a.tar.gz", {"pack-1/vendor/ComfyUI/link": "/etc/passwd"}),
            tmp_path / "host",
        )
    with pytest.raises(dev.SetupError, match="holds no ComfyUI"):
        dev.unpack_host(archive_of(tmp_path / "b.tar.gz", {"pack-1/README.md": b""}), tmp_path / "host")


def test_pip_settings_by_rank() -> None:
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
    assert dev.parse_pip_settings(text) == expected


def test_uv_uses_the_indexes_of_pip() -> None:
    settings = {
        "index-url": "file:///mirror",
        "extra-index-url": "file:///one file:///two",
        "find-links": "/a /b",
        "cert": "/ca.pem",
    }
    assert dev.index_settings(settings, {"SSL_CERT_FILE": "/mine.pem"}) == {
        "UV_DEFAULT_INDEX": "file:///mirror",
        "UV_INDEX": "file:///one file:///two",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/a,/b",
    }
    assert dev.index_settings(settings, {"UV_INDEX_URL": "file:///own"}).keys() == {
        "UV_FIND_LINKS",
        "SSL_CERT_FILE",
    }
    assert dev.index_settings({}, {}) == {}


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    host = tmp_path / "ComfyUI"
    (host / "comfy").mkdir(parents=True)
    (host / "main.py").touch()
    return host


def test_installed_comfyui_is_used_with_its_interpreter(comfyui: Path) -> None:
    assert dev.installed_host({}) is None
    assert dev.installed_host({"COMFYUI_PATH": str(comfyui)}) == dev.Environment(
        Path(sys.executable), comfyui
    )
    own = dev.interpreter(comfyui / ".venv")
    own.parent.mkdir(parents=True)
    own.touch()
    assert dev.installed_host({"COMFYUI_PATH": str(comfyui)}).python == own
    chosen = {"COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": sys.executable}
    assert dev.installed_host(chosen).python == Path(sys.executable)


def test_wrong_comfyui_paths_are_told(comfyui: Path, tmp_path: Path) -> None:
    with pytest.raises(dev.SetupError, match=r"there is no ComfyUI there\. Set it"):
        dev.installed_host({"COMFYUI_PATH": str(tmp_path)})
    with pytest.raises(dev.SetupError, match=r"there is no such file\. Set it"):
        dev.installed_host({"COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": str(tmp_path / "python")})


def test_missing_modules_are_named_with_their_remedy() -> None:
    dev.check_modules(Path(sys.executable), ("json",), "")
    with pytest.raises(dev.SetupError, match=r"lacks no_such_module_a, no_such_module_b\. Install them"):
        dev.check_modules(
            Path(sys.executable), ("json", "no_such_module_a", "no_such_module_b"), "Install them"
        )


def test_arguments_reach_the_command_untouched() -> None:
    arguments = ["-h", "--size", "3", "--", "x", "-k", "a or b"]
    for command in ("demo", "test", "bench"):
        assert dev.parse([command, *arguments]) == (command, arguments)
    assert dev.parse(["serve"]) == ("serve", [])


@pytest.mark.parametrize("argv", [[], ["dance"], ["serve", "--what"]])
def test_unknown_command_lines_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        dev.parse(argv)
    assert error.value.code == 2


def test_root_leaves_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(dev.ROOT), *sys.path])
    dev.keep_root_off_path()
    assert str(dev.ROOT) not in sys.path
