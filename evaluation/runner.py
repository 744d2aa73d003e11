"""Takes the demonstration's images: every prompt with every method, through the workflows that users get."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import nn

from .graphs import (
    GraphError,
    ObjectInfo,
    Prompt,
    add_node,
    insert_between,
    is_link,
    load_workflow,
    origin,
    set_inputs,
    to_prompt,
)
from .judges.judge import judge
from .prompt_sets.prompts import Record
from .report import ImageArray, Sample
from .server import ComfyServer, has_cuda

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"
PROBE_PACK = Path(__file__).parent / "probe"
KEEP_RESULTS = ("--cache-lru", "100")
"""Methods take turns, and the host forgets what the last prompt did not use: without this every image would load its model anew."""
MOST_SERVERS = 4
"""Servers that take images side by side, one core each: the demo model is too small to use several."""
OWN_NODES = "SafeGuidance"
SAMPLER_SETTINGS = ("sampler_name", "scheduler", "steps", "cfg", "denoise")
Settings: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Inputs to set in a workflow, by the title or class of their nodes."""
WARM_UP = Record("warm-up", "a red circle", 0, ("circle",), ("red",), None, None, None)


@dataclass(frozen=True)
class Method:
    """A method's shipped workflow as an API prompt with the probe in it, and the ids of the nodes that matter."""

    name: str
    workflow: str
    prompt: Prompt
    sampler: str
    saved: str
    result: str

    def prompt_for(self, record: Record) -> Prompt:
        edited = set_inputs(self.prompt, "Prompt", text=record.prompt)
        edited[self.sampler]["inputs"]["seed"] = record.seed
        return edited

    def settings(self) -> dict[str, Any]:
        """What reproduces the figures: the sampler's settings and the constants of the pack's own nodes."""
        sampler = self.prompt[self.sampler]["inputs"]
        own = [node for node in self.prompt.values() if node["class_type"].startswith(OWN_NODES)]
        nodes = {
            node["class_type"]: {name: value for name, value in node["inputs"].items() if not is_link(value)}
            for node in own
        }
        return {**{name: sampler[name] for name in SAMPLER_SETTINGS}, "nodes": nodes}


@dataclass(frozen=True)
class Shot:
    """One generated image, not judged yet: its file, its values, and what its sampling cost."""

    record: Record
    file: bytes
    image: ImageArray
    seconds: float
    calls: int


class Progress:
    """A bar on a terminal, a line every tenth of the way elsewhere."""

    WIDTH = 30

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total, self._stream, self._done, self._start = total, stream, 0, time.monotonic()
        self._lock = threading.Lock()

    def advance(self, what: str) -> None:
        """One more image is done; any thread may say so."""
        with self._lock:
            self._advance(what)

    def _advance(self, what: str) -> None:
        self._done += 1
        left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        text = f"{self._done}/{self._total} images, about {left:.0f} s left"
        if self._stream.isatty():
            bar = "#" * (self.WIDTH * self._done // self._total)
            self._stream.write(
                f"\r[{bar:<{self.WIDTH}}] {text} ({what})\x1b[K" + ("\n" if self._done == self._total else "")
            )
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            self._stream.write(text + "\n")
        self._stream.flush()


def load_method(
    name: str, workflow: str, object_info: ObjectInfo, settings: Settings | None = None
) -> Method:
    """A method's workflow, converted and with the probe in it, and with other settings than the file's where some are given.

    The probe sits right behind the model's loader, so that its wrappers enclose all that the method does while sampling.

    Raises:
        GraphError: when the workflow does not have exactly one sampler and one node that saves images, or lacks what is to be set.
    """
    prompt = to_prompt(load_workflow(WORKFLOWS / workflow), object_info)
    for node, values in (settings or {}).items():
        prompt = set_inputs(prompt, node, **values)
    sampler = _only(prompt, "latent_image", workflow)
    saved = _only(prompt, "filename_prefix", workflow)
    prompt, probe = insert_between(prompt, origin(prompt, sampler, "model"), "EvaluationProbe", "model")
    prompt, result = add_node(prompt, "EvaluationProbeResult", latent=[sampler, 0], probe=[probe, 1])
    return Method(name, workflow, prompt, sampler, saved, result)


def _only(prompt: Prompt, input_name: str, workflow: str) -> str:
    found = [key for key, node in prompt.items() if input_name in node["inputs"]]
    if len(found) != 1:
        raise GraphError(
            f"{workflow} has {len(found)} nodes with an input {input_name}. The demonstration needs exactly one."
        )
    return found[0]


def shoot(server: ComfyServer, method: Method, record: Record) -> Shot:
    """Generate one image."""
    outputs = server.run(method.prompt_for(record))["outputs"]
    (file,) = server.images({"outputs": {method.saved: outputs[method.saved]}})
    measured = json.loads(outputs[method.result]["probe"][0])
    return Shot(record, file, decode(file), measured["seconds"], measured["calls"])


def decode(file: bytes) -> ImageArray:
    """The (height, width, 3) 8-bit values of an image file."""
    with Image.open(io.BytesIO(file)) as image:
        return np.array(image.convert("RGB"), dtype=np.uint8)


@dataclass(frozen=True)
class Take:
    """All images of a run: by method, in the order of the records, with the methods and the host's description."""

    methods: list[Method]
    shots: dict[str, list[Shot]]
    stats: dict[str, Any]


def judged_samples(shots: Sequence[Shot], network: nn.Module) -> list[Sample]:
    """Shots with the judge's verdicts."""
    images = torch.from_numpy(np.stack([shot.image for shot in shots])).permute(0, 3, 1, 2) / 255
    return [
        Sample(shot.record, shot.image, shot.seconds, shot.calls, seen)
        for shot, seen in zip(shots, judge(images, network))
    ]


def server_count(records: int, cores: int | None = None) -> int:
    """How many servers take images at once: one per core, or one where they would share a GPU."""
    if has_cuda(Path(sys.executable)):
        return 1
    return max(1, min(cores or os.cpu_count() or 1, MOST_SERVERS, records))


def shoot_all(
    host: Path,
    workflows: Mapping[str, str],
    records: Sequence[Record],
    servers: int,
    settings: Mapping[str, Settings] | None = None,
) -> Take:
    """Every record with every method; all methods of a record one after the other on one server, so that their times are pairs.

    `settings` of a method replace those of its workflow.

    Raises:
        ServerError: when a server does not start or a prompt fails.
        GraphError: when a workflow cannot be converted.
    """
    progress, stop = Progress(len(records) * len(workflows), sys.stderr), threading.Event()
    with ThreadPoolExecutor(servers) as pool:
        shares = [
            pool.submit(
                _shoot_share, host, workflows, records[i::servers], servers, settings or {}, progress, stop
            )
            for i in range(servers)
        ]
        try:
            wait(shares, return_when=FIRST_EXCEPTION)
        finally:
            # One share has failed, or the user has had enough: the others end with the image that they are at.
            stop.set()
        takes = [share.result() for share in shares]
    order = [(i % servers, i // servers) for i in range(len(records))]
    shots = {name: [takes[share].shots[name][position] for share, position in order] for name in workflows}
    return Take(takes[0].methods, shots, takes[0].stats)


def _shoot_share(
    host: Path,
    workflows: Mapping[str, str],
    records: Sequence[Record],
    servers: int,
    settings: Mapping[str, Settings],
    progress: Progress,
    stop: threading.Event,
) -> Take:
    threads = max(1, (os.cpu_count() or 1) // servers) if servers > 1 else None
    shots: dict[str, list[Shot]] = {name: [] for name in workflows}
    with ComfyServer(host=host, packs=[PROBE_PACK], options=KEEP_RESULTS, threads=threads) as server:
        object_info, stats = server.get_json("/object_info"), server.get_json("/system_stats")
        methods = [
            load_method(name, workflow, object_info, settings.get(name))
            for name, workflow in workflows.items()
        ]
        for record in (WARM_UP, *records):
            for method in methods:
                if stop.is_set():
                    return Take(methods, shots, stats)
                shot = shoot(server, method, record)
                if record is not WARM_UP:
                    shots[method.name].append(shot)
                    progress.advance(f"{record.id}, {method.name}")
    return Take(methods, shots, stats)
