"""Negation sets through a real server: the user's model folders, image folders, and saved files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from safe_guidance.evaluation.server import ComfyServer
from safe_guidance.evaluation.server_errors import PromptFailed, PromptRejected
from safe_guidance.formats.negation_set import from_images, load, save


def make_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 32, 48, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder outside the host with a set in it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    save(from_images(make_images(3), name="elsewhere"), folder / "sets" / "far.safetensors")
    return folder


@pytest.fixture(scope="module")
def own_server(elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """Start a server whose extra_model_paths name that folder, with images in its input folder."""
    configuration = tmp_path_factory.mktemp("configuration") / "extra_model_paths.yaml"
    configuration.write_text(f"mine:\n  base_path: {elsewhere}\n  negation_sets: sets\n", encoding="utf-8")
    with ComfyServer(device="cpu", options=["--extra-model-paths-config", str(configuration)]) as running:
        folder = Path(running.base) / "input" / "unwanted"
        (folder / "more").mkdir(parents=True)
        for index, place in enumerate(("a.png", "b.jpg", "more/c.webp")):
            colours = (make_images(1, index)[0] * 255).byte()
            Image.frombytes("RGB", (48, 32), colours.numpy().tobytes()).save(folder / place)
        (folder / "broken.png").write_bytes(b"\x89PNG")
        yield running


def names(server: ComfyServer) -> list[str]:
    info = server.get_json("/object_info/SafeGuidanceLoadNegationSet")["SafeGuidanceLoadNegationSet"]
    (spec,) = info["input"]["required"].values()
    options: list[str] = spec[1]["options"] if spec[0] == "COMBO" else spec[0]
    return options


def save_folder(file_name: str, folder: str = "unwanted", overwrite: bool = False) -> dict[str, Any]:
    given = {"folder": folder, "sub_folders": True, "longest_side": 64, "drop_duplicates": True}
    return {
        "1": {"class_type": "SafeGuidanceNegationSetFromFolder", "inputs": given},
        "2": {
            "class_type": "SafeGuidanceSaveNegationSet",
            "inputs": {"negation_set": ["1", 0], "file_name": file_name, "overwrite": overwrite},
        },
    }


def test_the_users_own_folders_count(own_server: ComfyServer) -> None:
    assert "far.safetensors" in names(own_server) and "demo_star (bundled)" in names(own_server)
    prompt = {
        "1": {"class_type": "SafeGuidanceLoadNegationSet", "inputs": {"name": "far.safetensors"}},
        "2": {
            "class_type": "SafeGuidancePreviewNegationSet",
            "inputs": {"negation_set": ["1", 0], "most": 9},
        },
    }
    assert "elsewhere: 3 images" in own_server.run(prompt)["outputs"]["2"]["text"][0]


def test_a_folder_becomes_a_file_that_load_finds(own_server: ComfyServer, elsewhere: Path) -> None:
    outputs = own_server.run(save_folder("mine/new"))["outputs"]
    report = outputs["1"]["text"][0]
    assert report.startswith("3 images, 0 duplicates dropped, 1 files skipped\nbroken.png: ")
    assert "mine/new.safetensors" in names(own_server)
    # It is in the host's own folder, not in the one that was lent.
    assert len(load(Path(own_server.base) / "models" / "negation_sets" / "mine" / "new.safetensors")) == 3
    assert [path.name for path in elsewhere.rglob("*.safetensors")] == ["far.safetensors"]


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a\\..\\b", ".hidden", ""])
def test_files_stay_in_their_folder(own_server: ComfyServer, name: str) -> None:
    with pytest.raises(PromptFailed, match="A file cannot have the name"):
        own_server.run(save_folder(name))


@pytest.mark.parametrize("folder", ["../models", "/etc", "missing", "unwanted/../.."])
def test_folders_stay_in_the_input_folder(own_server: ComfyServer, folder: str) -> None:
    with pytest.raises(PromptRejected):
        own_server.run(save_folder("x", folder))
