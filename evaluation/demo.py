"""Demonstration: every method on fixed prompts and seeds, by its shipped workflow in a real ComfyUI."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .cases import memorisation, style
from .graphs import GraphError
from .judges.network import load_judge
from .method_sheet import Section, method_sheet
from .prompt_sets.prompts import DEMO_PROMPTS, SETS, Record, load_prompts
from .report import MethodRun, build_report, table, write_json
from .runner import EvaluationRun, GeneratedImage, Method, generate_all, judge_images, server_count
from .server import HOST_VARIABLE
from .server_errors import ServerError

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "none"
METHODS = {
    PLAIN: "demo_plain.json",
    "safe_denoiser": "demo_safe_denoiser.json",
    "spell": "demo_spell.json",
    "sld_weak": "demo_sld_weak.json",
    "sld_medium": "demo_sld_medium.json",
    "sld_strong": "demo_sld_strong.json",
    "sld_max": "demo_sld_max.json",
    "semantic_guidance": "demo_semantic_guidance.json",
    "safree": "demo_safree.json",
    "safree+safe_denoiser": "demo_safree_safe_denoiser.json",
    "sld_medium+safe_denoiser": "demo_sld_safe_denoiser.json",
    "stg": "demo_stg.json",
    "sdg": "demo_sdg.json",
    "dag": "demo_dag.json",
    "dag+sld_medium": "demo_dag_sld.json",
    "dag+stg": "demo_dag_stg.json",
}
NEED_EXTRAS = {
    "stg_nudenet": "demo_stg_nudenet.json",
    "stg_clip_style": "demo_stg_clip_style.json",
    "stg_two_detectors": "demo_stg_two_detectors.json",
}
"""Methods whose detectors need packages of the pack's extras. They run only when they are named."""
DEFAULT_METHODS = (PLAIN, "safe_denoiser", "stg", "dag")
"""Methods that run when none are named: minutes on two cores, where all methods take nearly half an hour."""
ALL = "all"
PER_SET = 32


def judged(
    method: Method, images: Sequence[GeneratedImage], prompts: dict[str, list[Record]], network: nn.Module
) -> MethodRun:
    """Judge a method's images and return them by prompt set."""
    samples = iter(judge_images(images, network))
    by_set = {name: [next(samples) for _ in prompts[name]] for name in SETS}
    return MethodRun(method.name, method.workflow, method.settings(), by_set)


def describe_host(stats: dict[str, Any]) -> dict[str, str]:
    """Return versions and device from the server's `/system_stats`."""
    system = stats["system"]
    return {
        "comfyui": system["comfyui_version"],
        "torch": system["pytorch_version"],
        "python": system["python_version"].split()[0],
        "device": stats["devices"][0]["name"],
        "platform": platform.platform(),
    }


def describe_model() -> dict[str, Any]:
    """Return the hashes of the files of the demo model, the judge and the prompts."""
    return {
        "name": "demo",
        "sha256": _hashes((ROOT / "assets" / "demo_model").glob("*.safetensors")),
        "evaluation_sha256": _hashes([*(ROOT / "evaluation" / "judges").glob("*.safetensors"), DEMO_PROMPTS]),
    }


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def write_images(folder: Path, images: dict[str, list[GeneratedImage]]) -> None:
    """Save the server's files unchanged, so that each contains the workflow that made it."""
    for method, of_method in images.items():
        (folder / method).mkdir(parents=True, exist_ok=True)
        for image in of_method:
            (folder / method / f"{image.record.id}.png").write_bytes(image.file)


def run_demo(host: Path, names: Sequence[str], per_set: int | None, output: Path) -> dict[str, Any]:
    """Run the methods, write images, contact sheet and report into `output`, and return the report.

    Args:
        per_set: prompts of each set; None for all of them.

    Raises:
        ServerError: when the server does not start or a prompt fails.
        GraphError: when a workflow cannot be converted.
    """
    prompts = {name: records[:per_set] for name, records in load_prompts().items()}
    records = [record for name in SETS for record in prompts[name]]
    network = load_judge()
    output.mkdir(parents=True, exist_ok=True)
    workflows = {name: (METHODS | NEED_EXTRAS)[name] for name in names}
    run: EvaluationRun = generate_all(host, workflows, records, server_count(len(records)))
    write_images(output / "images", run.images)
    runs = [judged(method, run.images[method.name], prompts, network) for method in run.methods]
    report = build_report(describe_host(run.stats), describe_model(), runs)
    further: list[Section] = []
    if set(DEFAULT_METHODS) <= set(names):
        per_style = None if per_set is None else style.PER_STYLE
        report["style"], section, images = style.run(host, network, per_style)
        write_images(output / "images", images)
        further.append(section)
        report["memorisation"], section, images = memorisation.run(host, network)
        write_images(output / "images", images)
        further.append(section)
    method_sheet(runs, further).save(output / "contact_sheet.png")
    write_json(output / "report.json", report)
    return report


def method_names(text: str) -> list[str]:
    """Parse a comma-separated list of method names.

    The plain sampler always comes first; "all" is every method of METHODS.

    Raises:
        argparse.ArgumentTypeError: when a name is unknown.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    names = [name for entry in named for name in (METHODS if entry == ALL else [entry])]
    unknown = sorted(set(names) - set(METHODS | NEED_EXTRAS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"There is no method {', '.join(unknown)}. Choose from {', '.join(METHODS | NEED_EXTRAS)}."
        )
    return [PLAIN, *dict.fromkeys(name for name in names if name != PLAIN)]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    made = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    known = (
        f"comma-separated, of {', '.join(METHODS | NEED_EXTRAS)}; "
        f"{ALL}: all but the last {len(NEED_EXTRAS)}; "
        f"default: {','.join(DEFAULT_METHODS)}"
    )
    made.add_argument("--methods", type=method_names, default=list(DEFAULT_METHODS), help=known)
    made.add_argument(
        "--full", action="store_true", help=f"all prompts instead of the first {PER_SET} of each set"
    )
    made.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        help="folder for images and figures (default: %(default)s)",
    )
    made.add_argument(
        "--host",
        type=Path,
        default=os.environ.get(HOST_VARIABLE),
        help=f"folder of ComfyUI (default: {HOST_VARIABLE})",
    )
    return made


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    known = parser()
    arguments = known.parse_args(argv)
    if arguments.host is None:
        known.error(f"No ComfyUI is known. Give --host, set {HOST_VARIABLE}, or start through dev.py.")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the demonstration. Returns 0 when every method ran on every prompt."""
    arguments = _arguments(argv)
    try:
        report = run_demo(
            arguments.host, arguments.methods, None if arguments.full else PER_SET, arguments.output
        )
    except (ServerError, GraphError, TimeoutError, OSError) as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    tables = [
        table(report),
        *([memorisation.table(report["memorisation"])] if "memorisation" in report else []),
    ]
    sys.stdout.write(
        "\n\n".join(tables)
        + f"\n\n{arguments.output / 'contact_sheet.png'}\n{arguments.output / 'report.json'}\n"
    )
    return 0
