"""`dev.py soak`: the same runs again and again in one host, bit-identical and in the same memory."""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reliability import write_block

STEPS, CFG, SIDE = 4, 5.0, 128
SEEDS = (1, 2)
CONCEPT = "a blue heart"
SETTLED = 3
"""Part of the runs, a third, after which memory is measured: caches fill during the first."""


@dataclass
class Record:
    """Results of the runs of one kind.

    Attributes:
        latents: hash of the first latents of each workflow and seed.
        different: descriptions of runs that repeated a workflow with another result.
        memory: MB in use after each run.
    """

    latents: dict[str, str] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def add(self, label: str, latents: Tensor, megabytes: float) -> None:
        """Add a run: compare it with the first of its label."""
        found = hashlib.sha256(latents.cpu().contiguous().numpy().tobytes()).hexdigest()
        if self.latents.setdefault(label, found) != found:
            self.different.append(label)
        self.memory.append(megabytes)

    def slope(self) -> float:
        """Return the growth of memory in kB per run, a least-squares line through the settled part."""
        values = torch.tensor(self.memory[len(self.memory) // SETTLED :], dtype=torch.float64)
        if len(values) < 2:
            return 0.0
        places = torch.arange(len(values), dtype=torch.float64)
        places -= places.mean()
        return float((places * values).sum() / places.square().sum()) * 1024


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="dev.py soak", description=(__doc__ or "").splitlines()[0])
    found.add_argument("--runs", type=int, default=200, help="half of them plain, half guarded")
    found.add_argument("--write", action="store_true", help="write the figures into docs/reliability.md")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command and return 1 when a repeat was different."""
    from .host import import_host

    options = parser().parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as folder:
        import_host(Path(folder))
        start = time.monotonic()
        with torch.inference_mode():
            plain, guarded, methods = soak(options.runs // 2)
    text = report(plain, guarded, methods, time.monotonic() - start)
    sys.stdout.write(text + "\n")
    if options.write:
        write_block("soak", text)
    return int(bool(plain.different or guarded.different))


def soak(runs: int) -> tuple[Record, Record, list[str]]:
    """Sample `runs` times without and `runs` times with methods, and return both records and the methods."""
    import psutil

    from .fuzz.node_inputs import Objects

    objects = Objects()
    guards = guarding_nodes(objects)
    process = psutil.Process()

    def megabytes() -> float:
        gc.collect()
        return float(process.memory_info().rss) / 2**20

    plain, guarded = Record(), Record()
    for run in range(runs):
        seed = SEEDS[run % len(SEEDS)]
        plain.add(f"plain {seed}", sample(objects, objects.values["MODEL"], seed), megabytes())
    names = list(guards)
    for run in range(runs):
        name, seed = names[run % len(names)], SEEDS[run // len(names) % len(SEEDS)]
        guarded.add(f"{name} {seed}", sample(objects, guards[name](), seed), megabytes())
    return plain, guarded, names


def guarding_nodes(objects: Any) -> dict[str, Callable[[], Any]]:
    """Return what attaches each method to the model again, by the node's name."""

    def attaching(node: Any) -> Callable[[], Any]:
        given = objects.defaults(node)
        # A method without its concept would refuse to run.
        given |= {name: CONCEPT for name, value in given.items() if value == ""}
        return lambda: node.EXECUTE_NORMALIZED(**given).args[0]

    found = {}
    for node in objects.fuzzed().values():
        schema = node.GET_SCHEMA()
        kinds = {entry.io_type for entry in schema.inputs}
        if "MODEL" in kinds and [output.io_type for output in schema.outputs][:1] == ["MODEL"]:
            found[schema.display_name] = attaching(node)
    return found


def sample(objects: Any, model: Any, seed: int) -> Tensor:
    """Return the latents of a short run of the host's own sampler."""
    nodes: Any = importlib.import_module("nodes")
    conditioning = objects.values["CONDITIONING"]
    latent = nodes.EmptyLatentImage().generate(SIDE, SIDE, 1)[0]
    sampled = nodes.common_ksampler(
        model, seed, STEPS, CFG, "euler", "karras", conditioning, conditioning, latent
    )
    result: Tensor = sampled[0]["samples"]
    return result


def report(plain: Record, guarded: Record, methods: Sequence[str], seconds: float) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| runs | number | different repeats | memory, kB per run |",
        "| --- | --- | --- | --- |",
        f"| plain KSampler | {len(plain.memory):,} | {len(plain.different)} | {plain.slope():.1f} |",
        f"| guarded | {len(guarded.memory):,} | {len(guarded.different)} | {guarded.slope():.1f} |",
        "",
        f"{seconds / 60:.0f} minutes, {STEPS} steps each; methods in turn: {', '.join(methods)}.",
    ]
    lines += [f"- different: {label}" for label in (*plain.different, *guarded.different)[:20]]
    return "\n".join(lines)
