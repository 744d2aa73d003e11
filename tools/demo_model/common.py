"""Code that the training scripts share: import of the pack's modules, arguments, and an optimiser."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"
PACK = "safe_guidance"

log = logging.getLogger("demo_model")


def pack_module(name: str) -> ModuleType:
    """Import a torch-only module of the pack, such as "demo.networks", under the pack's package name."""
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])
    return importlib.import_module(f"{PACK}.{name}")


def argument_parser(description: str | None, steps: int, batch: int) -> argparse.ArgumentParser:
    """Make a parser of the arguments that every training script has."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("demo_model_work"), help="folder for intermediate files"
    )
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


class MuonAdamW:
    """Muon for hidden matrices and convolution kernels (seen as matrices), AdamW for everything else.

    `torch.optim.Muon` takes two-dimensional parameters only, so it is given flattened views that share
    storage with the kernels. Muon's learning rate 0.02 and AdamW's 0.003 are scaled by `set_scale` over the
    run.
    """

    MUON_LR, ADAMW_LR = 0.02, 0.003

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], is_edge: tuple[str, ...]
    ) -> None:
        """Distribute the parameters between both optimisers.

        Args:
            is_edge: prefixes of parameters that read the input or write the output, and so are not hidden.
        """
        self.parameters: list[nn.Parameter] = []
        hidden, others = [], []
        for name, parameter in named_parameters:
            self.parameters.append(parameter)
            (hidden if parameter.ndim >= 2 and not name.startswith(is_edge) else others).append(parameter)
        self._views = [(p, nn.Parameter(p.data.view(p.shape[0], -1))) for p in hidden]
        self._muon = torch.optim.Muon([view for _, view in self._views], lr=self.MUON_LR, weight_decay=0.01)
        self._adamw = torch.optim.AdamW(others, lr=self.ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0)

    def set_scale(self, scale: float) -> None:
        """Set the factor of both learning rates."""
        for group in self._muon.param_groups:
            group["lr"] = self.MUON_LR * scale
        for group in self._adamw.param_groups:
            group["lr"] = self.ADAMW_LR * scale

    def step(self, loss: Tensor) -> None:
        """Update the parameters by the gradient of the loss, clipped to norm 1."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        self._muon.step()
        self._adamw.step()


class Average:
    """Exponential moving average of parameters, with a horizon that grows at the start."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay, self._steps = parameters, decay, 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Add the present values to the average."""
        self._steps += 1
        decay = min(self._decay, self._steps / (10 + self._steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._parameters], 1 - decay)


def schedule(steps: int, warmup: int, stable: float, floor: float = 0.01) -> Iterator[float]:
    """Yield factors of the learning rate: linear warm-up, constant share `stable`, linear fall to `floor`."""
    for step in range(steps):
        if step < warmup:
            yield (step + 1) / warmup
        else:
            left = (steps - step) / (steps * (1 - stable))
            yield max(floor, min(1.0, left))


class Progress:
    """Log of the mean loss and the speed, every `every` steps."""

    def __init__(self, every: int, batch: int) -> None:
        self._every, self._batch = every, batch
        self._losses: list[float] = []
        self._start = self._last = time.monotonic()

    def update(self, step: int, loss: Tensor) -> None:
        """Record the loss of a step."""
        self._losses.append(loss.item())
        if (step + 1) % self._every:
            return
        now = time.monotonic()
        mean = math.fsum(self._losses) / len(self._losses)
        speed = len(self._losses) * self._batch / (now - self._last)
        log.info("step %d  %.0f s  loss %.5f  %.1f images/s", step + 1, now - self._start, mean, speed)
        self._losses, self._last = [], now
