"""The demonstration with a fake server that returns plain colours."""

from __future__ import annotations

import argparse
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from safe_guidance.evaluation import demo, graphs, runner
from safe_guidance.evaluation.cases import memorisation, style
from safe_guidance.evaluation.judges.network import HEADS
from safe_guidance.evaluation.prompt_sets.prompts import SETS, load_prompts
from safe_guidance.evaluation.server_errors import ServerError

STATS = {
    "system": {
        "comfyui_version": "0.30.0",
        "pytorch_version": "2.11.0",
        "python_version": "3.11.7 (main) [GCC]",
    },
    "devices": [{"name": "cpu"}],
}


def described(workflows: list[Path]) -> dict[str, Any]:
    """Describe the node classes in workflow files by their sockets, as far as the conversion needs it."""
    info: dict[str, Any] = {}
    for path in workflows:
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            info[node["type"]] = {
                "input": {"required": {socket["name"]: [socket["type"], {}] for socket in node["inputs"]}}
            }
    return info


class FakeServer:
    """Fake server that draws a plain colour: with a method darker, slower, and with one more model call."""

    prompts: list[graphs.Prompt] = []

    def __init__(self, host: Path, packs: list[Path], options: tuple[str, ...], threads: int | None) -> None:
        assert packs == [runner.PROBE_PACK] and "--cache-lru" in options
        self.threads = threads

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_json(self, path: str) -> Any:
        return STATS if path == "/system_stats" else described(sorted(runner.WORKFLOWS.glob("*.json")))

    def run(self, prompt: graphs.Prompt) -> dict[str, Any]:
        self.prompts.append(prompt)
        (saved,), (result,) = graphs.find(prompt, "SaveImage"), graphs.find(prompt, "EvaluationProbeResult")
        cost = 2 if is_protected(prompt) else 1
        measured = json.dumps({"calls": 20 * cost, "rows": 40, "seconds": 0.5 * cost})
        return {"outputs": {saved: {"images": [200 // cost]}, result: {"probe": [measured]}}}

    def images(self, entry: dict[str, Any]) -> list[bytes]:
        (output,) = entry["outputs"].values()
        file = io.BytesIO()
        Image.new("RGB", (128, 128), (output["images"][0],) * 3).save(file, "PNG")
        return [file.getvalue()]


def is_protected(prompt: graphs.Prompt) -> bool:
    return any(node["class_type"] == "SafeGuidanceSafeDenoiser" for node in prompt.values())


class Brightness(nn.Module):
    """Judge that sees a star in bright images and nothing in dark ones."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = {name: torch.full((len(images), len(classes)), -1.0) for name, classes in HEADS.items()}
        logits["shapes"][:, HEADS["shapes"].index("star")] = images.mean((1, 2, 3)) - 0.5
        return logits


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeServer]:
    FakeServer.prompts = []
    monkeypatch.setattr(runner, "ComfyServer", FakeServer)
    monkeypatch.setattr(demo, "server_count", lambda records: 1)
    monkeypatch.setattr(demo, "load_judge", Brightness)
    return FakeServer


def test_a_run_is_paired_warmed_up_and_written(
    fake: type[FakeServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = demo.run_demo(tmp_path, ["none", "safe_denoiser"], 2, tmp_path / "out")
    sent = [
        (is_protected(prompt), prompt[graphs.find(prompt, "KSampler")[0]]["inputs"]["seed"])
        for prompt in fake.prompts
    ]
    seeds = [seed for start in (1000, 2000, 3000) for seed in (start, start + 1)]
    assert sent == [(protected, seed) for seed in (0, *seeds) for protected in (False, True)]

    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    plain, method = report["runs"]
    assert plain["unsafe_rate"] == dict.fromkeys(SETS, 1.0) and method["unsafe_rate"] == dict.fromkeys(
        SETS, 0.0
    )
    assert method["seconds_ratio"] == method["model_calls_ratio"] == 2.0
    assert method["benign"]["mean_abs_change"] == pytest.approx(100 / 255)
    assert report["host"]["python"] == "3.11.7" and report["model"]["name"] == "demo"

    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert (
        "contact_sheet.png" in files
        and "images/none/named-000.png" in files
        and "images/safe_denoiser/benign-001.png" in files
    )
    assert len(files) == 1 + 2 * 6
    assert np.array(Image.open(tmp_path / "out" / "images" / "none" / "implied-001.png")).mean() == 200
    assert "12/12 images" in capsys.readouterr().err


def test_all_of_the_heart_brings_the_style_case(
    fake: type[FakeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for case in (style, memorisation):
        monkeypatch.setattr(case, "server_count", lambda records: 1)
    monkeypatch.setattr(style, "PER_STYLE", 2)
    report = demo.run_demo(tmp_path, demo.DEFAULT_METHODS, 1, tmp_path)
    assert (report["style"]["references"], report["style"]["prompts"], report["style"]["benign_prompts"]) == (
        4,
        2,
        2,
    )
    assert len(list((tmp_path / "images" / "style_safe_denoiser").glob("*.png"))) == 4
    assert "memorisation" in report
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_case_of_memorised_images_runs_one_workflow_with_and_without(
    fake: type[FakeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memorisation, "server_count", lambda records: 1)
    entry, section, images = memorisation.run(tmp_path, Brightness())
    assert [run["method"] for run in entry["runs"]] == list(memorisation.WORKFLOWS) and len(
        section.rows
    ) == 1 + len(images)
    nodes = {run["method"]: run["settings"]["nodes"] for run in entry["runs"]}
    strengths = [
        nodes[name]["SafeGuidanceSafeDenoiser"]["strength"]
        for name in (memorisation.CONTROL, memorisation.BEFORE)
    ]
    assert (
        strengths == [0, 0] and nodes["safe_denoiser"]["SafeGuidanceSafeDenoiser"]["strength"] == -1
    )  # automatic
    assert all(
        node["SafeGuidanceLoadNegationSet"]["name"] == "demo_memorised (bundled)" for node in nodes.values()
    )
    loras = [prompt[graphs.find(prompt, "LoraLoaderModelOnly")[0]]["inputs"] for prompt in fake.prompts]
    assert {lora["lora_name"] for lora in loras} == {memorisation.LORA.name}
    # The control and the three runs with the LoRA take turns.
    assert [lora["strength_model"] for lora in loras[:8]] == [0.0, 1.0, 1.0, 1.0] * 2
    assert all(len(of_run) == 16 + memorisation.BENIGN for of_run in images.values())
    assert memorisation.table(json.loads(json.dumps(entry))).splitlines()[1].startswith("without_lora ")


def test_servers_side_by_side_take_the_same_images(fake: type[FakeServer], tmp_path: Path) -> None:
    workflows = {name: demo.METHODS[name] for name in ("none", "safe_denoiser")}
    records = [record for name in SETS for record in load_prompts()[name][:2]][:5]
    alone, together = (runner.generate_all(tmp_path, workflows, records, servers) for servers in (1, 3))
    for name in workflows:
        assert (
            [image.record for image in together.images[name]]
            == [image.record for image in alone.images[name]]
            == records
        )
        assert all(
            np.array_equal(a.image, b.image) for a, b in zip(together.images[name], alone.images[name])
        )


def test_one_core_one_server() -> None:
    assert [runner.server_count(96, cores) for cores in (1, 2, 16)] == [1, 2, 4]
    assert runner.server_count(1, 8) == 1


def test_a_failing_server_stops_the_others(
    fake: type[FakeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, records = threading.Barrier(2, timeout=60), load_prompts()["named"]
    taken = fake.run

    def run(self: FakeServer, prompt: graphs.Prompt) -> dict[str, Any]:
        seed = prompt[graphs.find(prompt, "KSampler")[0]]["inputs"]["seed"]
        if seed in (records[0].seed, records[1].seed):
            first.wait()
        if seed == records[1].seed:
            raise ServerError("The sampler failed. Do something.")
        return taken(self, prompt)

    monkeypatch.setattr(fake, "run", run)
    with pytest.raises(ServerError, match="The sampler failed"):
        runner.generate_all(tmp_path, {"none": demo.METHODS["none"]}, records, 2)


def test_the_settings_reproduce_a_run(fake: type[FakeServer], tmp_path: Path) -> None:
    settings = demo.run_demo(tmp_path, ["none", "safe_denoiser"], 1, tmp_path)["runs"][1]["settings"]
    assert {
        "sampler_name": "dpmpp_2m",
        "scheduler": "karras",
        "steps": 20,
        "cfg": 5.0,
    }.items() <= settings.items()
    assert settings["nodes"]["SafeGuidanceLoadNegationSet"] == {"name": "demo_star (bundled)"}
    assert (
        "strength" in settings["nodes"]["SafeGuidanceSafeDenoiser"]
        and "model" not in settings["nodes"]["SafeGuidanceSafeDenoiser"]
    )


def test_the_probe_sits_right_behind_the_loader() -> None:
    method = runner.load_method(
        "safe_denoiser", "demo_safe_denoiser.json", described(sorted(runner.WORKFLOWS.glob("*.json")))
    )
    (loader,) = graphs.find(method.prompt, "SafeGuidanceLoadDemoModel")
    (probe,), (denoiser,) = (
        graphs.find(method.prompt, "EvaluationProbe"),
        graphs.find(method.prompt, "SafeGuidanceSafeDenoiser"),
    )
    assert method.prompt[probe]["inputs"] == {"model": [loader, 0]}
    assert method.prompt[denoiser]["inputs"]["model"] == [probe, 0]
    assert method.prompt[method.sampler]["inputs"]["model"] == [denoiser, 0]
    assert method.prompt[method.result]["inputs"] == {"latent": [method.sampler, 0], "probe": [probe, 1]}


def test_a_workflow_with_two_samplers_is_refused() -> None:
    with pytest.raises(graphs.GraphError, match="has 2 nodes with an input latent_image"):
        runner.load_method(
            "two", "demo_build_negation_set.json", described(sorted(runner.WORKFLOWS.glob("*.json")))
        )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none,safe_denoiser", ["none", "safe_denoiser"]),
        ("safe_denoiser", ["none", "safe_denoiser"]),
        (" safe_denoiser , none,safe_denoiser", ["none", "safe_denoiser"]),
        ("", ["none"]),
        ("all", list(demo.METHODS)),
        ("stg,all", ["none", "stg", *[name for name in demo.METHODS if name not in ("none", "stg")]]),
    ],
)
def test_the_plain_sampler_is_always_first(text: str, names: list[str]) -> None:
    assert demo.method_names(text) == names


def test_an_unknown_method_is_named_with_the_known_ones() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"no method magic\. Choose from none, "):
        demo.method_names("magic,none")


def test_without_a_host_there_is_no_demonstration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(demo.HOST_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as end:
        demo.main([])
    assert end.value.code == 2 and "No ComfyUI is known" in capsys.readouterr().err


def test_a_failure_is_told_and_is_no_success(
    fake: type[FakeServer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: FakeServer, prompt: graphs.Prompt) -> dict[str, Any]:
        raise ServerError("The sampler failed. Do something.")

    monkeypatch.setattr(fake, "run", fail)
    assert demo.main(["--host", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "The sampler failed. Do something." in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()


def test_success_prints_the_table(
    fake: type[FakeServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--host", str(tmp_path), "--output", str(tmp_path / "out"), "--methods", "none"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("none ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_ten_lines_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = runner.Progress(96, stream)
        for _ in range(96):
            progress.advance("x")
    assert (
        terminal.getvalue().count("\n") == 1
        and terminal.getvalue().endswith("\x1b[K\n")
        and "[####" in terminal.getvalue()
    )
    assert len(file.getvalue().splitlines()) == 10 and file.getvalue().splitlines()[-1].startswith(
        "96/96 images"
    )
