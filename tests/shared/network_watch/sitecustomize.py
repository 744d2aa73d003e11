"""Refuses and records every network call that leaves this machine. Python imports this module when it starts.

`tests/conftest.py` puts this folder on the path of all processes of a test run, and reads the records at the
end. Calls that a library makes without Python's sockets are not seen.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

RECORDS = "SAFE_GUIDANCE_NETWORK_RECORDS"
"""Variable with the folder of the records: one file per process, empty if it reached nothing."""
NAMES = frozenset({"", "localhost", "ip6-localhost"})
RESOLVING = frozenset({"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"})
SENDING = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
FRAMES = 12
"""Calls that a record shows."""


def is_local(host: Any) -> bool:
    """Return True for a name or an address of this machine."""
    text = host.decode("utf-8", "replace") if isinstance(host, bytes) else host
    if text is None or text in NAMES:
        return True
    try:
        address = ipaddress.ip_address(str(text).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def reached(event: str, arguments: tuple[Any, ...]) -> Any:
    """Return the foreign host that an event of Python's audit reaches, or None."""
    if event in RESOLVING:
        return None if is_local(arguments[0]) else arguments[0]
    if event in SENDING and arguments[0].family in (socket.AF_INET, socket.AF_INET6):
        address = arguments[1]
        if address is not None and not is_local(address[0]):
            return address[0]
    return None


def watch(records: Path) -> Path:
    """Watch this process from now on and return its record."""
    record = records / f"{os.getpid()}.txt"
    record.touch()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        host = reached(event, arguments) if event.startswith("socket.") else None
        if host is not None:
            stack = "".join(traceback.format_stack(limit=FRAMES))
            with record.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{event} {host!r} by {sys.argv}\n{stack}\n")
            raise OSError(f"The tests may not reach {host!r}. The pack downloads nothing.")

    sys.addaudithook(audit)
    return record


if RECORDS in os.environ:
    watch(Path(os.environ[RECORDS]))
