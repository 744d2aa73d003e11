"""Short name of the demo world's module, which is in the pack because a node draws images of it."""

from __future__ import annotations

import sys

import common

sys.modules[__name__] = common.pack_module("demo.world")
