"""ComfyServer: starts a server, says what is wrong with it, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from safe_guidance.evaluation import server as module
from safe_guidance.evaluation import server_process
from safe_guidance.evaluation.server import ComfyServer
from safe_guidance.evaluation.server_errors import PromptFailed, PromptRejected, ServerError

ROOT = Path(module.__file__).resolve().parents[1]
FAKE_HOST = """
    import json, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    port = int(sys.argv[sys.argv.index("--port") + 1])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"system": {"argv": sys.argv}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    try:
        server = HTTPServer(("127.0.0.1", port), Handler)
    except OSError:
        print(f"Port {port} is already in use on address 127.0.0.1.")
        raise SystemExit(1)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
"""
PARENT = """
import importlib, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import dev
dev.keep_root_off_path()
dev.load_pack()
module = importlib.import_module("safe_guidance.evaluation.server")
server = module.ComfyServer(base=Path(sys.argv[2]), device="cpu")
server.start()
print(server.process.pid, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Return True when a process exists and is not a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def fake_host(tmp_path: Path) -> Path:
    host = tmp_path / "fake"
    host.mkdir()
    (host / "main.py").write_text(textwrap.dedent(FAKE_HOST), encoding="utf-8")
    return host


def image_prompt(size: int) -> dict[str, object]:
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": size, "height": 64, "batch_size": 2, "color": 255},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "lifecycle"}},
    }


@pytest.mark.timeout(400)
def test_real_server_from_start_to_stop() -> None:
    with ComfyServer() as server:
        process, base = server.process, server.base
        assert any(name.startswith("SafeGuidance") for name in server.get_json("/object_info"))
        images = server.images(server.run(image_prompt(64), timeout=60))
        assert [image[:4] for image in images] == [b"\x89PNG"] * 2
        with pytest.raises(PromptRejected, match="node 1 .EmptyImage.: .*width") as rejected:
            server.run(image_prompt(-1))
        assert rejected.value.errors["node_errors"].keys() == {"1"}
        with pytest.raises(PromptFailed, match="SaveImage failed with") as failed:
            prompt = image_prompt(64)
            prompt["2"] = {
                "class_type": "SaveImage",
                "inputs": {"images": ["1", 0], "filename_prefix": "../../outside"},
            }
            server.run(prompt, timeout=60)
        assert failed.value.node_type == "SaveImage"
        server.interrupt()
    assert process.poll() is not None
    assert not base.exists()


@pytest.mark.timeout(400)
def test_pack_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken-pack"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('reason of the failure')", encoding="utf-8")
    server = ComfyServer(packs=[broken], device="cpu")
    with pytest.raises(
        ServerError, match=r"(?s)could not import the pack broken-pack\..*reason of the failure"
    ):
        server.start()
    with pytest.raises(ServerError, match="not running"):
        _ = server.base


@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_killed_parent_leaves_no_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(ROOT), str(tmp_path / "base")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
    assert wait_for(lambda: not is_running(pid))


def test_given_base_stays_and_can_be_used_again(fake_host: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for _ in range(2):
        with ComfyServer(base=base, host=fake_host, device="cpu") as server:
            assert (base / "custom_nodes" / "safe-guidance" / "evaluation").is_dir()
            (base / "output" / "image.png").touch()
        assert server.packs["safe-guidance"].is_dir()
    assert (base / "output" / "image.png").exists()


def test_taken_port_is_tried_again(fake_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = module.free_port
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        ports = [taken, taken, choose()]
        monkeypatch.setattr(module, "free_port", lambda: ports.pop(0))
        with ComfyServer(host=fake_host, device="cpu") as server:
            assert server.port != taken
        ports = [taken] * 3
        with pytest.raises(ServerError, match="already in use"):
            ComfyServer(host=fake_host, device="cpu").start()


def test_server_that_dies_shows_its_log(fake_host: Path) -> None:
    (fake_host / "main.py").write_text("raise SystemExit('the reason')", encoding="utf-8")
    with pytest.raises(ServerError, match=r"(?s)ended with exit code 1 while it started\..*the reason"):
        ComfyServer(host=fake_host, device="cpu").start()


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's background jobs")
def test_server_stops_although_the_shell_ignores_interrupts(fake_host: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ComfyServer(host=fake_host, device="cpu") as server:
            process = server.process
            begin = time.monotonic()
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.returncode is not None
    assert time.monotonic() - begin < server_process.STOP_SECONDS / 2


def test_foreign_folder_in_the_place_of_the_pack_is_left_alone(fake_host: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "base" / "custom_nodes" / "safe-guidance"
    foreign.mkdir(parents=True)
    (foreign / "file").touch()
    with pytest.raises(ServerError, match="not a link. Move it away"):
        ComfyServer(base=tmp_path / "base", host=fake_host, device="cpu").start()
    assert (foreign / "file").exists()


def test_unknown_host_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.HOST_VARIABLE, raising=False)
    with pytest.raises(ServerError, match="No ComfyUI is known. Start through dev.py"):
        ComfyServer()


def test_temporary_folder_is_removed_after_a_failed_start(
    fake_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "temporary"))
    os.mkdir(tmp_path / "temporary")
    (fake_host / "main.py").write_text("raise SystemExit(3)", encoding="utf-8")
    with pytest.raises(ServerError):
        ComfyServer(host=fake_host, device="cpu").start()
    assert not list((tmp_path / "temporary").iterdir())
