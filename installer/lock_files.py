"""The files that pin every package with its hash."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
BOOTSTRAP = REQUIREMENTS / "bootstrap.txt"
HOST = REQUIREMENTS / "host.txt"
HOST_LOWEST = REQUIREMENTS / "host_lowest.txt"
FRONTEND_NEWEST = REQUIREMENTS / "frontend_newest.txt"
DEVELOPMENT = REQUIREMENTS / "development.txt"
TOOLS = REQUIREMENTS / "tools.txt"
