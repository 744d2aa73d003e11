"""The watch over network calls: in every process of a test run, what leaves this machine is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RECORDS = "SAFE_GUIDANCE_NETWORK_RECORDS"
FOREIGN = (
    "socket.create_connection(('192.0.2.1', 80), 1)",
    "socket.getaddrinfo('huggingface.co', 443)",
    "socket.gethostbyname('example.org')",
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "urllib.request.urlopen('https://example.org')",
    "asyncio.run(asyncio.open_connection('2001:db8::1', 80))",
)


@pytest.mark.parametrize("call", FOREIGN)
def test_a_call_that_leaves_this_machine_is_refused_and_recorded(tmp_path: Path, call: str) -> None:
    program = f"import asyncio, socket, urllib.request\ntry:\n    {call}\nexcept OSError:\n    pass"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, RECORDS: str(tmp_path)}, check=True)
    (record,) = tmp_path.iterdir()
    assert record.read_text().startswith("socket.")


def test_calls_within_this_machine_are_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), 5) as client, server.accept()[0] as answer:
            client.sendall(b"x")
            assert answer.recv(1) == b"x"
    assert socket.getaddrinfo("localhost", 80)


def test_this_process_is_watched() -> None:
    assert (Path(os.environ[RECORDS]) / f"{os.getpid()}.txt").exists()
