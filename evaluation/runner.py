"""Generates the images of an evaluation: every prompt with every method, by the workflows that users get."""

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

from .graphs import GraphError, Prompt, add_node, insert_between, is_link, origin, set_inputs
from .judges.judge import judge
from .prompt_sets.prompts import Record
from .report import ImageArray, Sample
from .server import ComfyServer
from .server_process import has_cuda
from .workflow_conversion import ObjectInfo, load_workflow, to_prompt

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"
PROBE_PACK = Path(__file__).parent / "probe"
KEEP_RESULTS = ("--cache-lru", "100")
"""Option of the host. Methods alternate, and without it every image would load its model again."""
MOST_SERVERS = 4
"""Most servers that run in parallel, one core each: the demo model is too small to use several cores."""
OWN_NODES = "SafeGuidance"
SAMPLER_SETTINGS = ("sampler_name", "scheduler", "steps", "cfg", "denoise")
Settings: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Inputs to set in a workflow, by the title or class of their nodes."""
WARM_UP = Record("warm-up", "a red circle", 0, ("circle",), ("red",), None, None, None)


@dataclass(frozen=True)
class Method:
    """A method's shipped workflow as an API prompt with the probe in it.

    Attributes:
        workflow: file name in workflows/.
        sampler: id of the node that samples.
        saved: id of the node that saves the image.
        result: id of the node that reports the probe's measurements.
    """

    name: str
    workflow: str
    prompt: Prompt
    sampler: str
    saved: str
    result: str

    def prompt_for(self, record: Record) -> Prompt:
        """Return the API prompt with a record's text and seed."""
        edited = set_inputs(self.prompt, "Prompt", text=record.prompt)
        edited[self.sampler]["inputs"]["seed"] = record.seed
        return edited

    def settings(self) -> dict[str, Any]:
        """Return the settings that reproduce the figures: the sampler's and those of the pack's nodes."""
        sampler = self.prompt[self.sampler]["inputs"]
        own = [node for node in self.prompt.values() if node["class_type"].startswith(OWN_NODES)]
        nodes = {
            node["class_type"]: {name: value for name, value in node["inputs"].items() if not is_link(value)}
            for node in own
        }
        return {**{name: sampler[name] for name in SAMPLER_SETTINGS}, "nodes": nodes}


@dataclass(frozen=True)
class GeneratedImage:
    """One generated image, not judged yet, with the seconds and model calls of its sampling."""

    record: Record
    file: bytes
    image: ImageArray
    seconds: float
    calls: int


class Progress:
    """Progress display: a bar on a terminal, elsewhere a line for every tenth of the images. Thread-safe."""

    WIDTH = 30

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total, self._stream, self._done, self._start = total, stream, 0, time.monotonic()
        self._lock = threading.Lock()

    def advance(self, label: str) -> None:
        """Count one more finished image."""
        with self._lock:
            self._advance(label)

    def _advance(self, label: str) -> None:
        self._done += 1
        left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        text = f"{self._done}/{self._total} images, about {left:.0f} s left"
        if self._stream.isatty():
            bar = "#" * (self.WIDTH * self._done // self._total)
            self._stream.write(
                f"\r[{bar:<{self.WIDTH}}] {text} ({label})\x1b[K"
                + ("\n" if self._done == self._total else "")
            )
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            self._stream.write(text + "\n")
        self._stream.flush()


def load_method(
    name: str, workflow: str, object_info: ObjectInfo, settings: Settings | None = None
) -> Method:
    """Load a method's workflow, set the given inputs, convert it, and insert the probe.

    The probe is inserted right after the model's loader, so that its wrappers enclose all that the method
    does.

    Raises:
        GraphError: when the workflow does not have exactly one sampler and one node that saves images, or
            when it lacks an input that is to be set.
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
            f"{workflow} has {len(found)} nodes with an input {input_name}. The evaluation needs exactly one."
        )
    return found[0]


def generate(server: ComfyServer, method: Method, record: Record) -> GeneratedImage:
    """Generate one image."""
    outputs = server.run(method.prompt_for(record))["outputs"]
    (file,) = server.images({"outputs": {method.saved: outputs[method.saved]}})
    measured = json.loads(outputs[method.result]["probe"][0])
    return GeneratedImage(record, file, decode(file), measured["seconds"], measured["calls"])


def decode(file: bytes) -> ImageArray:
    """Decode an image file into 8-bit values (height, width, 3)."""
    with Image.open(io.BytesIO(file)) as image:
        return np.array(image.convert("RGB"), dtype=np.uint8)


@dataclass(frozen=True)
class EvaluationRun:
    """All images of an evaluation.

    Attributes:
        images: by the method's name, in the order of the records.
        stats: the server's answer to `/system_stats`.
    """

    methods: list[Method]
    images: dict[str, list[GeneratedImage]]
    stats: dict[str, Any]


def judge_images(images: Sequence[GeneratedImage], network: nn.Module) -> list[Sample]:
    """Judge generated images and return them with their verdicts."""
    # (B, H, W, 3) in 0..255 -> (B, 3, H, W) in [0, 1]
    values = torch.from_numpy(np.stack([image.image for image in images])).permute(0, 3, 1, 2) / 255
    return [
        Sample(image.record, image.image, image.seconds, image.calls, verdict)
        for image, verdict in zip(images, judge(values, network))
    ]


def server_count(records: int, cores: int | None = None) -> int:
    """Return how many servers run in parallel: one per core, or a single one on a GPU."""
    if has_cuda(Path(sys.executable)):
        return 1
    return max(1, min(cores or os.cpu_count() or 1, MOST_SERVERS, records))


def generate_all(
    host: Path,
    workflows: Mapping[str, str],
    records: Sequence[Record],
    servers: int,
    settings: Mapping[str, Settings] | None = None,
) -> EvaluationRun:
    """Generate the image of every record with every method.

    All methods of a record run one after the other on the same server, so that their times can be compared in
    pairs. `settings` of a method replace those of its workflow.

    Raises:
        ServerError: when a server does not start or a prompt fails.
        GraphError: when a workflow cannot be converted.
    """
    progress = Progress(len(records) * len(workflows), sys.stderr)
    stop = threading.Event()
    with ThreadPoolExecutor(servers) as pool:
        shares = [
            pool.submit(
                _generate_share, host, workflows, records[i::servers], servers, settings or {}, progress, stop
            )
            for i in range(servers)
        ]
        try:
            wait(shares, return_when=FIRST_EXCEPTION)
        finally:
            # When one share fails or the user interrupts, the others stop after their present image.
            stop.set()
        runs = [share.result() for share in shares]
    order = [(i % servers, i // servers) for i in range(len(records))]
    images = {name: [runs[share].images[name][position] for share, position in order] for name in workflows}
    return EvaluationRun(runs[0].methods, images, runs[0].stats)


def _generate_share(
    host: Path,
    workflows: Mapping[str, str],
    records: Sequence[Record],
    servers: int,
    settings: Mapping[str, Settings],
    progress: Progress,
    stop: threading.Event,
) -> EvaluationRun:
    threads = max(1, (os.cpu_count() or 1) // servers) if servers > 1 else None
    images: dict[str, list[GeneratedImage]] = {name: [] for name in workflows}
    with ComfyServer(host=host, packs=[PROBE_PACK], options=KEEP_RESULTS, threads=threads) as server:
        object_info, stats = server.get_json("/object_info"), server.get_json("/system_stats")
        methods = [
            load_method(name, workflow, object_info, settings.get(name))
            for name, workflow in workflows.items()
        ]
        for record in (WARM_UP, *records):
            for method in methods:
                if stop.is_set():
                    return EvaluationRun(methods, images, stats)
                image = generate(server, method, record)
                if record is not WARM_UP:
                    images[method.name].append(image)
                    progress.advance(f"{record.id}, {method.name}")
    return EvaluationRun(methods, images, stats)
