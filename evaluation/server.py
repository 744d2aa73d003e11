"""A real, headless ComfyUI with this pack, run from Python and used through its HTTP interface."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

PACK = Path(__file__).resolve().parents[1]
PACK_NAME = "safe-guidance"
HOST_VARIABLE = "SAFE_GUIDANCE_HOST"
BASE_FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
START_SECONDS = 180.0
STOP_SECONDS = 20.0
DYING_SECONDS = 2.0
POLL_SECONDS = 0.05
PROBE_SECONDS = 2.0
REQUEST_SECONDS = 60.0
PORT_ATTEMPTS = 3
LOG_LINES = 60
PR_SET_PDEATHSIG = 1
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class ServerError(RuntimeError):
    """Error of a server that did not start, stopped by itself or gave an unexpected answer."""


class PortTaken(ServerError):
    """Error of a port that another process took before the server started."""


class PromptRejected(ServerError):
    """Error of a prompt that the server rejected.

    `errors` is its answer, with `error` and `node_errors` by node id.
    """

    def __init__(self, errors: Mapping[str, Any]) -> None:
        super().__init__(f"ComfyUI rejected the prompt. Correct these inputs: {_rejection(errors)}")
        self.errors = dict(errors)


class PromptFailed(ServerError):
    """Error of a prompt that failed or was interrupted in one of its nodes."""

    def __init__(self, node_type: str, exception_type: str, message: str) -> None:
        super().__init__(f"{node_type} failed with {exception_type}: {message.strip()}")
        self.node_type = node_type
        self.exception_type = exception_type
        self.message = message


def _rejection(errors: Mapping[str, Any]) -> str:
    nodes = errors.get("node_errors") or {}
    found = [
        f"node {node_id} ({node.get('class_type')}): {error.get('message')} {error.get('details')}".strip()
        for node_id, node in nodes.items()
        for error in node.get("errors", [])
    ]
    general = errors.get("error")
    return "; ".join(found) or str(general.get("message") if isinstance(general, Mapping) else general)


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


def _start_options() -> dict[str, Any]:
    """Return options of Popen that put the server into a process group of its own.

    So only this class interrupts it, and not the terminal's Ctrl-C.
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


def _interrupt_process(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        process.send_signal(signal.SIGINT)


class ComfyServer:
    """A ComfyUI server with this pack on a free local port; a context manager.

    The server ends with the thread that started it (Linux) or with the process.

    Args:
        base: directory that is kept; by default a fresh one that is removed at the end.
        packs: folders of further node packs.
        options: further arguments of the host.
        device: "auto" uses a GPU if there is one.
        host: folder of ComfyUI; by default the one that dev.py found.
        python: interpreter that runs the host; by default this one.
        pack: folder of this pack.
        threads: threads that its computations may use; by default all.
    """

    def __init__(
        self,
        base: Path | None = None,
        packs: Sequence[Path] = (),
        options: Sequence[str] = (),
        device: Literal["auto", "cpu"] = "auto",
        host: Path | None = None,
        python: Path | None = None,
        pack: Path = PACK,
        threads: int | None = None,
    ) -> None:
        if host is None and not os.environ.get(HOST_VARIABLE):
            raise ServerError(
                "No ComfyUI is known. "
                f"Start through dev.py, or set {HOST_VARIABLE} to the folder of a ComfyUI."
            )
        self.host = Path(os.environ[HOST_VARIABLE]) if host is None else host
        self.python = Path(sys.executable) if python is None else python
        self.options = tuple(options)
        self.packs = {PACK_NAME: pack, **{path.name: path for path in packs}}
        self.device = device
        self.threads = threads
        self.port = 0
        self._given_base = None if base is None else base.absolute()
        self._base: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base(self) -> Path:
        """Return the directory with the server's models, input, output and so on.

        Raises ServerError before the start.
        """
        if self._base is None:
            raise ServerError("The server is not running. Start it first.")
        return self._base

    @property
    def log(self) -> Path:
        """Return the file with everything that the server printed."""
        return self.base / "comfyui.log"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Return the server's process. Raises ServerError before the start."""
        if self._process is None:
            raise ServerError("The server is not running. Start it first.")
        return self._process

    @property
    def url(self) -> str:
        """Return the address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises ServerError, with the end of the log, when it does not answer or a pack cannot be imported.
        """
        atexit.register(self.stop)
        try:
            self._prepare_base()
            self._start_on_free_port()
            self._check_packs()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove its base directory unless that was given.

        Does nothing when it is stopped already.
        """
        atexit.unregister(self.stop)
        self._stop_process()
        if self._given_base is None and self._base is not None:
            shutil.rmtree(self._base, ignore_errors=True)
        self._base = None

    def wait(self) -> int:
        """Wait until the server ends by itself and return its exit code."""
        return self.process.wait()

    def _prepare_base(self) -> None:
        self._base = (
            Path(tempfile.mkdtemp(prefix=f"{PACK_NAME}-")) if self._given_base is None else self._given_base
        )
        for name in BASE_FOLDERS:
            (self._base / name).mkdir(parents=True, exist_ok=True)
        for name, path in self.packs.items():
            link_folder(self._base / "custom_nodes" / name, path.resolve())

    def _start_on_free_port(self) -> None:
        for attempt in range(1, PORT_ATTEMPTS + 1):
            self.port = free_port()
            self._launch()
            try:
                return self._wait_until_ready()
            except PortTaken:
                self._stop_process()
                if attempt == PORT_ATTEMPTS:
                    raise

    def _command(self) -> list[str]:
        command = [
            str(self.python),
            "main.py",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
        ]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.packs]
        command += self.options
        if self.device == "cpu" or not has_cuda(self.python):
            command.append("--cpu")
        return command

    def _launch(self) -> None:
        with self.log.open("wb") as log:
            streams: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": log,
                "stderr": subprocess.STDOUT,
            }
            threads = {} if self.threads is None else dict.fromkeys(THREAD_VARIABLES, str(self.threads))
            environment = {**os.environ, **threads}
            self._process = subprocess.Popen(
                self._command(), cwd=self.host, env=environment, **streams, **_start_options()
            )

    def _stop_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            _interrupt_process(process)
        try:
            process.wait(STOP_SECONDS)
        except BaseException as error:
            process.kill()
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            self._check_alive("while it started")
            if time.monotonic() > end:
                raise ServerError(
                    f"ComfyUI did not answer within {START_SECONDS:.0f} s. "
                    f"Its log ends with:\n{self.log_tail()}"
                )
            time.sleep(POLL_SECONDS)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/system_stats", timeout=PROBE_SECONDS) as response:
                stats = json.load(response)
            # Another program may have taken the port; only our server runs on our base directory.
            return str(self.base) in stats["system"]["argv"]
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
            return False

    def _check_alive(self, when: str) -> None:
        code = self.process.poll()
        if code is None:
            return
        tail = self.log_tail()
        error = PortTaken if f"Port {self.port} is already in use" in tail else ServerError
        raise error(f"ComfyUI ended with exit code {code} {when}. Its log ends with:\n{tail}")

    def _check_packs(self) -> None:
        marker = "(IMPORT FAILED):"
        failed = {
            Path(line.partition(marker)[2].strip()).name
            for line in self._log_text().splitlines()
            if marker in line
        }
        for name in failed & self.packs.keys():
            raise ServerError(
                f"ComfyUI could not import the pack {name}. Its log says why:\n{self.log_tail()}"
            )

    def _log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = LOG_LINES) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(self._log_text().splitlines()[-lines:])

    def get_bytes(self, path: str) -> bytes:
        """Get the body that the server sends for a path. Raises HTTPError (of urllib) for an error status."""
        with urllib.request.urlopen(self.url + path, timeout=REQUEST_SECONDS) as response:
            return bytes(response.read())

    def get_json(self, path: str) -> Any:
        """Get the JSON that the server sends for a path. Raises HTTPError (of urllib) for an error status."""
        return json.loads(self.get_bytes(path))

    def post_json(self, path: str, body: Any) -> Any:
        """Send JSON and return the JSON of the answer, or None if it is empty.

        Raises PromptRejected on status 400, else HTTPError.
        """
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(_error_body(error.read())) from error
        return json.loads(content) if content else None

    def run(self, prompt: Mapping[str, Any], timeout: float = 600.0) -> dict[str, Any]:
        """Run a prompt in the API's form and return its entry of the history.

        Raises PromptRejected, PromptFailed, TimeoutError (the prompt is then interrupted) and ServerError
        when the server ends.
        """
        prompt_id = self.post_json("/prompt", {"prompt": prompt})["prompt_id"]
        end = time.monotonic() + timeout
        while True:
            entry: dict[str, Any] | None = self._history(prompt_id)
            if entry is not None:
                break
            if time.monotonic() > end:
                self.interrupt()
                raise TimeoutError(
                    f"The prompt did not end within {timeout:.0f} s and was interrupted. Allow it more time."
                )
            time.sleep(POLL_SECONDS)
        _check_success(entry)
        return entry

    def _history(self, prompt_id: str) -> dict[str, Any] | None:
        try:
            found: dict[str, dict[str, Any]] = self.get_json(f"/history/{prompt_id}")
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DYING_SECONDS)
            self._check_alive("while it ran a prompt")
            raise
        return found.get(prompt_id)

    def images(self, entry: Mapping[str, Any]) -> list[bytes]:
        """Return the image files that a prompt wrote, by its entry of the history."""
        found = [image for output in entry["outputs"].values() for image in output.get("images", [])]
        return [self.get_bytes("/view?" + urllib.parse.urlencode(image)) for image in found]

    def interrupt(self) -> None:
        """Interrupt the prompt that runs now."""
        self.post_json("/interrupt", {})


def _error_body(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    return body if isinstance(body, dict) else {"error": content.decode("utf-8", "replace")}


def _check_success(entry: Mapping[str, Any]) -> None:
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return
    messages: dict[str, dict[str, Any]] = dict(status.get("messages", []))
    details = messages.get("execution_error")
    if details is not None:
        raise PromptFailed(
            str(details["node_type"]), str(details["exception_type"]), str(details["exception_message"])
        )
    interrupted = messages.get("execution_interrupted", {})
    raise PromptFailed(str(interrupted.get("node_type")), "Interrupted", "the prompt was interrupted")
