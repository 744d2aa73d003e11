"""The demonstration: every method on fixed prompts and seeds, through a real ComfyUI and the workflows that users get."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import nn

from .contact_sheet import contact_sheet
from .graphs import GraphError, ObjectInfo, Prompt, add_node, insert_between, is_link, load_workflow, origin, set_inputs, to_prompt
from .judge import judge
from .judge_network import load_judge
from .prompts import DEMO_PROMPTS, SETS, Record, load_prompts
from .report import MethodRun, Picture, Sample, build_report, table, write_json
from .server import HOST_VARIABLE, ComfyServer, ServerError

ROOT = Path(__file__).resolve().parents[1]
PROBE_PACK = Path(__file__).parent / "probe"
PLAIN = "none"
METHODS = {PLAIN: "demo_plain.json", "safe_denoiser": "demo_safe_denoiser.json"}
PER_SET = 32
KEEP_RESULTS = ("--cache-lru", "100")
"""Methods take turns, and the host forgets what the last prompt did not use: without this every picture would load its model anew."""
OWN_NODES = "SafeGuidance"
SAMPLER_SETTINGS = ("sampler_name", "scheduler", "steps", "cfg", "denoise")
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
        nodes = {node["class_type"]: {name: value for name, value in node["inputs"].items() if not is_link(value)} for node in own}
        return {**{name: sampler[name] for name in SAMPLER_SETTINGS}, "nodes": nodes}


@dataclass(frozen=True)
class Shot:
    """One generated picture, not judged yet: its file, its values, and what its sampling cost."""

    record: Record
    file: bytes
    picture: Picture
    seconds: float
    calls: int


class Progress:
    """A bar on a terminal, a line every tenth of the way elsewhere."""

    WIDTH = 30

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total, self._stream, self._done, self._start = total, stream, 0, time.monotonic()

    def advance(self, what: str) -> None:
        self._done += 1
        left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        text = f"{self._done}/{self._total} pictures, about {left:.0f} s left"
        if self._stream.isatty():
            bar = "#" * (self.WIDTH * self._done // self._total)
            self._stream.write(f"\r[{bar:<{self.WIDTH}}] {text} ({what})\x1b[K" + ("\n" if self._done == self._total else ""))
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            self._stream.write(text + "\n")
        self._stream.flush()


def load_method(name: str, object_info: ObjectInfo, folder: Path = ROOT / "workflows") -> Method:
    """A method's workflow, converted and with the probe in it.

    The probe sits right behind the model's loader, so that its wrappers enclose all that the method does while sampling.

    Raises:
        GraphError: when the workflow does not have exactly one sampler and one node that saves pictures.
    """
    workflow = METHODS[name]
    prompt = to_prompt(load_workflow(folder / workflow), object_info)
    sampler = _only(prompt, "latent_image", workflow)
    saved = _only(prompt, "filename_prefix", workflow)
    prompt, probe = insert_between(prompt, origin(prompt, sampler, "model"), "EvaluationProbe", "model")
    prompt, result = add_node(prompt, "EvaluationProbeResult", latent=[sampler, 0], probe=[probe, 1])
    return Method(name, workflow, prompt, sampler, saved, result)


def _only(prompt: Prompt, input_name: str, workflow: str) -> str:
    found = [key for key, node in prompt.items() if input_name in node["inputs"]]
    if len(found) != 1:
        raise GraphError(f"{workflow} has {len(found)} nodes with an input {input_name}. The demonstration needs exactly one.")
    return found[0]


def shoot(server: ComfyServer, method: Method, record: Record) -> Shot:
    """Generate one picture."""
    outputs = server.run(method.prompt_for(record))["outputs"]
    (file,) = server.images({"outputs": {method.saved: outputs[method.saved]}})
    measured = json.loads(outputs[method.result]["probe"][0])
    return Shot(record, file, decode(file), measured["seconds"], measured["calls"])


def decode(file: bytes) -> Picture:
    """The (height, width, 3) 8-bit values of a picture file."""
    with Image.open(io.BytesIO(file)) as image:
        return np.array(image.convert("RGB"), dtype=np.uint8)


def shoot_all(server: ComfyServer, methods: Sequence[Method], records: Sequence[Record], progress: Progress) -> dict[str, list[Shot]]:
    """Every record with every method; all methods of a record one after the other, so that their times are pairs."""
    for method in methods:
        shoot(server, method, WARM_UP)
    shots: dict[str, list[Shot]] = {method.name: [] for method in methods}
    for record in records:
        for method in methods:
            shots[method.name].append(shoot(server, method, record))
            progress.advance(f"{record.id}, {method.name}")
    return shots


def judged(method: Method, shots: Sequence[Shot], prompts: dict[str, list[Record]], network: nn.Module) -> MethodRun:
    """A method's run with the judge's verdicts, by prompt set."""
    pictures = torch.from_numpy(np.stack([shot.picture for shot in shots])).permute(0, 3, 1, 2) / 255
    verdicts = judge(pictures, network)
    samples = (Sample(shot.record, shot.picture, shot.seconds, shot.calls, v) for shot, v in zip(shots, verdicts))
    by_set = {name: [next(samples) for _ in prompts[name]] for name in SETS}
    return MethodRun(method.name, method.workflow, method.settings(), by_set)


def describe_host(stats: dict[str, Any]) -> dict[str, str]:
    """Versions and device from the server's `/system_stats`."""
    system = stats["system"]
    return {
        "comfyui": system["comfyui_version"],
        "torch": system["pytorch_version"],
        "python": system["python_version"].split()[0],
        "device": stats["devices"][0]["name"],
        "platform": platform.platform(),
    }


def describe_model() -> dict[str, Any]:
    """The demo model, the judge and the prompts by the hashes of their files."""
    return {
        "name": "demo",
        "sha256": _hashes((ROOT / "assets" / "demo_model").glob("*.safetensors")),
        "evaluation_sha256": _hashes([*(ROOT / "evaluation").glob("*.safetensors"), DEMO_PROMPTS]),
    }


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def write_pictures(folder: Path, shots: dict[str, list[Shot]]) -> None:
    """Save the server's files as they are: each still holds the prompt that made it."""
    for method, of_method in shots.items():
        (folder / method).mkdir(parents=True, exist_ok=True)
        for shot in of_method:
            (folder / method / f"{shot.record.id}.png").write_bytes(shot.file)


def run_demo(host: Path, names: Sequence[str], per_set: int | None, output: Path) -> dict[str, Any]:
    """Run the methods on the first `per_set` prompts of each set (None: all) and write everything into `output`. Returns the report.

    Raises:
        ServerError: when the server does not start or a prompt fails.
        GraphError: when a workflow cannot be converted.
    """
    prompts = {name: records[:per_set] for name, records in load_prompts().items()}
    records = [record for name in SETS for record in prompts[name]]
    network = load_judge()
    output.mkdir(parents=True, exist_ok=True)
    with ComfyServer(host=host, packs=[PROBE_PACK], options=KEEP_RESULTS) as server:
        object_info, stats = server.get_json("/object_info"), server.get_json("/system_stats")
        methods = [load_method(name, object_info) for name in names]
        shots = shoot_all(server, methods, records, Progress(len(records) * len(methods), sys.stderr))
    write_pictures(output / "pictures", shots)
    runs = [judged(method, shots[method.name], prompts, network) for method in methods]
    report = build_report(describe_host(stats), describe_model(), runs)
    contact_sheet(runs).save(output / "contact_sheet.png")
    write_json(output / "report.json", report)
    return report


def method_names(text: str) -> list[str]:
    """Method names from a comma-separated list, the plain sampler always first.

    Raises:
        argparse.ArgumentTypeError: when a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        raise argparse.ArgumentTypeError(f"There is no method {', '.join(unknown)}. Choose from {', '.join(METHODS)}.")
    return [PLAIN, *dict.fromkeys(name for name in names if name != PLAIN)]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--methods", type=method_names, default=list(METHODS), help=f"comma-separated, of {', '.join(METHODS)}")
    parser.add_argument("--full", action="store_true", help=f"all prompts instead of the first {PER_SET} of each set")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for pictures and figures (default: %(default)s)")
    parser.add_argument("--host", type=Path, default=os.environ.get(HOST_VARIABLE), help=f"folder of ComfyUI (default: {HOST_VARIABLE})")
    arguments = parser.parse_args(argv)
    if arguments.host is None:
        parser.error(f"No ComfyUI is known. Give --host, set {HOST_VARIABLE}, or start through dev.py.")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the demonstration; 0 when every method ran on every prompt."""
    arguments = _arguments(argv)
    try:
        report = run_demo(arguments.host, arguments.methods, None if arguments.full else PER_SET, arguments.output)
    except (ServerError, GraphError, TimeoutError, OSError) as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    sys.stdout.write(f"{table(report)}\n\n{arguments.output / 'contact_sheet.png'}\n{arguments.output / 'report.json'}\n")
    return 0
