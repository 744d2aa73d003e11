"""The package indexes that pip is configured for, as environment variables of uv."""

from __future__ import annotations

import ast
from collections.abc import Mapping

UV_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")


def index_settings(pip_settings: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables that make uv use pip's package indexes, unless uv has its own."""
    found: dict[str, str] = {}
    if not any(name in environ for name in UV_INDEX_VARIABLES):
        if "index-url" in pip_settings:
            found["UV_DEFAULT_INDEX"] = pip_settings["index-url"]
        if "extra-index-url" in pip_settings:
            found["UV_INDEX"] = pip_settings["extra-index-url"]
            # pip takes the best match of all its indexes. The lock file's hashes fix the contents anyway.
            found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if "find-links" in pip_settings:
        found["UV_FIND_LINKS"] = ",".join(pip_settings["find-links"].split())
    if "trusted-host" in pip_settings:
        found["UV_INSECURE_HOST"] = pip_settings["trusted-host"]
    if "cert" in pip_settings:
        found["SSL_CERT_FILE"] = pip_settings["cert"]
    return {name: value for name, value in found.items() if name not in environ}


def parse_pip_settings(text: str) -> dict[str, str]:
    """Return the settings in the output of `pip config list`.

    As in pip, environment variables win over the section [install], and that over [global].
    """
    settings: dict[str, str] = {}
    ranks = {"global": 0, "install": 1, ":env:": 2}
    best: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        rank = ranks.get(section, -1)
        if rank >= best.get(name, 0):
            best[name] = rank
            settings[name] = " ".join(str(ast.literal_eval(value)).split())
    return settings
