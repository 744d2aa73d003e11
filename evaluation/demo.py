"""The demonstration: every method on fixed prompts and seeds, through a real ComfyUI and the workflows that users get."""

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
from .contact_sheet import Section, contact_sheet
from .graphs import GraphError
from .judges.network import load_judge
from .prompt_sets.prompts import DEMO_PROMPTS, SETS, Record, load_prompts
from .report import MethodRun, build_report, table, write_json
from .runner import Method, Shot, judged_samples, server_count, shoot_all
from .server import HOST_VARIABLE, ServerError

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
"""Methods whose detectors need packages of the pack's extras: measured when they are named."""
HEART = (PLAIN, "safe_denoiser", "stg", "dag")
"""What is measured when nothing is named: minutes on two cores, where all methods take most of half an hour."""
ALL = "all"
PER_SET = 32


def judged(
    method: Method, shots: Sequence[Shot], prompts: dict[str, list[Record]], network: nn.Module
) -> MethodRun:
    """A method's run with the judge's verdicts, by prompt set."""
    samples = iter(judged_samples(shots, network))
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
        "evaluation_sha256": _hashes([*(ROOT / "evaluation" / "judges").glob("*.safetensors"), DEMO_PROMPTS]),
    }


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def write_images(folder: Path, shots: dict[str, list[Shot]]) -> None:
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
    take = shoot_all(
        host, {name: (METHODS | NEED_EXTRAS)[name] for name in names}, records, server_count(len(records))
    )
    write_images(output / "images", take.shots)
    runs = [judged(method, take.shots[method.name], prompts, network) for method in take.methods]
    report = build_report(describe_host(take.stats), describe_model(), runs)
    further: list[Section] = []
    if set(HEART) <= set(names):
        report["style"], section, shots = style.run(
            host, network, None if per_set is None else style.PER_STYLE
        )
        write_images(output / "images", shots)
        further.append(section)
        report["memorisation"], section, shots = memorisation.run(host, network)
        write_images(output / "images", shots)
        further.append(section)
    contact_sheet(runs, further).save(output / "contact_sheet.png")
    write_json(output / "report.json", report)
    return report


def method_names(text: str) -> list[str]:
    """Method names from a comma-separated list, the plain sampler always first; "all" is every method of METHODS.

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


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    known = f"comma-separated, of {', '.join(METHODS | NEED_EXTRAS)}; {ALL}: all but the last {len(NEED_EXTRAS)}; default: {','.join(HEART)}"
    parser.add_argument("--methods", type=method_names, default=list(HEART), help=known)
    parser.add_argument(
        "--full", action="store_true", help=f"all prompts instead of the first {PER_SET} of each set"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        help="folder for images and figures (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        type=Path,
        default=os.environ.get(HOST_VARIABLE),
        help=f"folder of ComfyUI (default: {HOST_VARIABLE})",
    )
    arguments = parser.parse_args(argv)
    if arguments.host is None:
        parser.error(f"No ComfyUI is known. Give --host, set {HOST_VARIABLE}, or start through dev.py.")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the demonstration; 0 when every method ran on every prompt."""
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
