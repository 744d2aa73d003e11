"""A real, headless ComfyUI with this pack, run from Python and used through its HTTP interface."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from .server_client import POLL_SECONDS, ServerClient
from .server_errors import PortTaken, ServerError
from .server_process import free_port, has_cuda, link_folder, start_options, stop_process

PACK = Path(__file__).resolve().parents[1]
PACK_NAME = "safe-guidance"
HOST_VARIABLE = "SAFE_GUIDANCE_HOST"
FRONTEND_VARIABLE = "SAFE_GUIDANCE_FRONTEND"
"""Environment variable with the folder of another web interface than the host's."""
BASE_FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
START_SECONDS = 180.0
DYING_SECONDS = 2.0
PROBE_SECONDS = 2.0
PORT_ATTEMPTS = 3
LOG_LINES = 60
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class ComfyServer(ServerClient):
    """A ComfyUI server with this pack on a free local port; a context manager.

    The server ends with the thread that started it (Linux) or with the process.

    Args:
        base: directory that is kept; by default a fresh one that is removed at the end.
        packs: folders of further node packs.
        options: further arguments of the host.
        device: "auto" uses a GPU if there is one.
        host: folder of ComfyUI; by default the one that dev.py found.
        threads: threads that its computations may use; by default all.
    """

    def __init__(
        self,
        base: Path | None = None,
        packs: Sequence[Path] = (),
        options: Sequence[str] = (),
        device: Literal["auto", "cpu"] = "auto",
        host: Path | None = None,
        threads: int | None = None,
    ) -> None:
        if host is None and not os.environ.get(HOST_VARIABLE):
            raise ServerError(
                "No ComfyUI is known. "
                f"Start through dev.py, or set {HOST_VARIABLE} to the folder of a ComfyUI."
            )
        self.host = Path(os.environ[HOST_VARIABLE]) if host is None else host
        self.options = tuple(options)
        self.packs = {PACK_NAME: PACK, **{path.name: path for path in packs}}
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
        command = [sys.executable, "main.py", "--base-directory", str(self.base)]
        command += ["--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.packs]
        if os.environ.get(FRONTEND_VARIABLE):
            command += ["--front-end-root", os.environ[FRONTEND_VARIABLE]]
        command += self.options
        if self.device == "cpu" or not has_cuda(Path(sys.executable)):
            command.append("--cpu")
        return command

    def _launch(self) -> None:
        with self.log.open("wb") as log:
            threads = {} if self.threads is None else dict.fromkeys(THREAD_VARIABLES, str(self.threads))
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.host,
                env={**os.environ, **threads},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **start_options(),
            )

    def _stop_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            stop_process(process)

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

    def raise_if_ended(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(DYING_SECONDS)
        self._check_alive("while it ran a prompt")

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

    def log_tail(self) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(self._log_text().splitlines()[-LOG_LINES:])
