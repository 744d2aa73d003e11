"""Shared parts of the artwork world's scripts: arguments, logs, checkpoints, the artwork, the optimiser.

The optimiser, the running average and the building blocks of the networks are those of `tools/demo_model`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEMO_MODEL_TOOLS = str(Path(__file__).resolve().parents[1] / "demo_model")
if _DEMO_MODEL_TOOLS not in sys.path:
    sys.path.append(_DEMO_MODEL_TOOLS)

import common  # noqa: E402
from sources import artwork_folder  # noqa: E402

log = logging.getLogger("artwork_world")


def pack_module(name: str) -> ModuleType:
    """Import a torch-only module of the pack, such as "demo.artwork_world"."""
    return common.pack_module(name)


def argument_parser(description: str | None, steps: int, batch: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every script takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=artwork_folder() / "work", help="folder for data, checkpoints and logs"
    )
    if steps:
        parser.add_argument("--steps", type=int, default=steps, help="length of the whole run")
        parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    if batch:
        parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 lets torch choose")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def start(args: argparse.Namespace) -> torch.device:
    """Apply the common arguments, log to a file beside the console, and return the device."""
    args.work.mkdir(parents=True, exist_ok=True)
    name = Path(sys.argv[0]).stem
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.work / f"{name}.log.txt")],
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path that becomes `path` when the block ends, so that no reader sees half a file."""
    temporary = path.with_name(path.name + ".partial")
    yield temporary
    os.replace(temporary, path)


def load_artwork(work: Path, device: torch.device) -> Any:
    """Read sprites.npz as `demo.artwork_renderer.Artwork`."""
    renderer = pack_module("demo.artwork_renderer")
    sprites, photographs = {}, {}
    with np.load(work / "sprites.npz", allow_pickle=False) as arrays:
        for key in arrays.files:
            kind, _, name = key.partition("/")
            image = torch.from_numpy(arrays[key]).to(device).float() / 255
            if kind == "photograph":
                photographs[name] = image
            else:
                sprites[kind, name] = image
    return renderer.Artwork(sprites, photographs)


def learning_rate_scale(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Return the factor of the learning rates: linear warm-up, constant, then linear decay to 1 % at the end.

    A run is extended by a larger `steps`, as long as it has not reached the last `decay_share` of it.
    """
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1.0, steps * decay_share)
    return max(0.01, min(1.0, left))


class Optimizer(common.MuonAdamW):
    """Muon for hidden matrices, AdamW for everything else, with a state that checkpoints can hold."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimisers."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of both optimisers."""
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])


class Run:
    """A training run that can be stopped at any time and resumed from its last checkpoint.

    A checkpoint holds the parameters, their running average, the optimiser's state, the step and the state of
    the random number generators. It is written to a temporary file first.
    """

    def __init__(self, path: Path, module: nn.Module, edges: tuple[str, ...], ema_decay: float) -> None:
        """Prepare a run.

        Args:
            path: the checkpoint.
            module: the network, on its device.
            edges: prefixes of parameters that Muon leaves to AdamW.
            ema_decay: decay of the running average per step.
        """
        self.path, self.module = path, module
        self.optimizer = Optimizer(module.named_parameters(), edges)
        self.average = common.Average(self.optimizer.parameters, ema_decay)
        self.step = 0

    def advance(self, loss: Tensor) -> None:
        """Make one optimiser step, update the running average and count the step."""
        self.optimizer.step(loss)
        self.average.update()
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "step": self.step,
            "module": self.module.state_dict(),
            "average": dict(zip(self._names(), self.average.values)),
            "average_steps": self.average._steps,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with atomic(self.path) as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Restore the checkpoint, if there is one."""
        if not self.path.is_file():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.step = state["step"]
        self.module.load_state_dict(state["module"])
        with torch.no_grad():
            for value, name in zip(self.average.values, self._names()):
                value.copy_(state["average"][name])
        self.average._steps = state["average_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and len(state["random_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        log.info("resumed from step %d", self.step)

    def averaged(self) -> dict[str, Tensor]:
        """Return the running average as a state dict on the CPU."""
        return {
            name: value.detach().cpu().contiguous() for name, value in zip(self._names(), self.average.values)
        }

    def _names(self) -> list[str]:
        return [name for name, _ in self.module.named_parameters()]


class Progress:
    """Log of the mean loss, the speed and the images seen since the run's first step."""

    def __init__(self, every: int, batch: int) -> None:
        self._every, self._batch = every, batch
        self._losses: list[Tensor] = []
        self._last = time.monotonic()

    def update(self, step: int, loss: Tensor) -> None:
        """Count one step; log every `every` steps."""
        self._losses.append(loss.detach())
        if step % self._every:
            return
        now = time.monotonic()
        mean = torch.stack(self._losses).mean().item()
        speed = len(self._losses) * self._batch / (now - self._last)
        log.info("step %d  %d images  loss %.5f  %.1f images/s", step, step * self._batch, mean, speed)
        self._losses, self._last = [], now
