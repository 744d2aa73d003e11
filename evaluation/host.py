"""Import of ComfyUI into this process, for measurements that a server would make less exact."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .server import HOST_VARIABLE


def import_host(base: Path, path: str | None = None) -> None:
    """Make the host's modules importable, configured for the CPU and for `base` as its base directory.

    Raises:
        RuntimeError: when no host is known.
    """
    path = path or os.environ.get(HOST_VARIABLE)
    if not path:
        raise RuntimeError(f"{HOST_VARIABLE} does not name a ComfyUI. Start this with 'python3 dev.py'.")
    if path not in sys.path:
        sys.path.insert(0, path)
    sys.argv = [sys.argv[0], "--cpu", "--base-directory", str(base), "--disable-all-custom-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    # The host's program imports this first; another module of that name may be found later.
    import utils.extra_config  # noqa: F401
