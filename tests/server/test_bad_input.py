"""Bad input through the real server: one clear sentence each, and the server goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safe_guidance.evaluation.server import ComfyServer
from safe_guidance.evaluation.server_errors import PromptFailed, PromptRejected
from safe_guidance.formats.negation_set import FORMAT, from_images, save

GOOD = from_images(torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0)), name="good")


@pytest.fixture(scope="module")
def folder(server: ComfyServer) -> Iterator[Path]:
    path = Path(server.base) / "models" / "negation_sets"
    path.mkdir(parents=True, exist_ok=True)
    yield path


def preview(name: str) -> dict[str, Any]:
    return {
        "1": {"class_type": "SafeGuidanceLoadNegationSet", "inputs": {"name": name}},
        "2": {
            "class_type": "SafeGuidancePreviewNegationSet",
            "inputs": {"negation_set": ["1", 0], "most": 64},
        },
    }


def build(width: int, height: int) -> dict[str, Any]:
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": width, "height": height, "batch_size": 1, "color": 0},
        },
        "2": {
            "class_type": "SafeGuidanceBuildNegationSet",
            "inputs": {"images": ["1", 0], "name": "x", "source": "", "licence": ""},
        },
        "3": {
            "class_type": "SafeGuidancePreviewNegationSet",
            "inputs": {"negation_set": ["2", 0], "most": 64},
        },
    }


def write_other_format(path: Path) -> None:
    save_file(
        {"picture.000000": torch.zeros(16, 16, 3, dtype=torch.uint8)}, path, metadata={"format": "embedding"}
    )


def write_truncated(path: Path) -> None:
    save(GOOD, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_nothing(path: Path) -> None:
    save_file({}, path, metadata={"format": FORMAT})


def write_huge_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")


def write_floats(path: Path) -> None:
    save_file({"picture.000000": torch.full((16, 16, 3), torch.nan)}, path, metadata={"format": FORMAT})


BAD_FILES = {
    "another format": (write_other_format, "is not a negation set. Choose a file"),
    "truncated": (write_truncated, "is damaged or not a safetensors file"),
    "no images": (write_nothing, "has no images. Give it at least one"),
    "huge header": (write_huge_header, "is damaged or not a safetensors file"),
    "floats that are not numbers": (write_floats, "is not an 8-bit RGB image"),
}


@pytest.mark.parametrize(("write", "sentence"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files_are_named_and_the_server_goes_on(
    server: ComfyServer, folder: Path, write: Callable[[Path], None], sentence: str
) -> None:
    write(folder / "bad.safetensors")
    save(GOOD, folder / "good.safetensors")
    with pytest.raises(PromptFailed, match=sentence) as raised:
        server.run(preview("bad.safetensors"))
    assert "bad.safetensors" in str(raised.value)
    outputs = server.run(preview("good.safetensors"))["outputs"]
    assert outputs["2"]["images"]
    assert "2 images (2 different), 32 x 32 pixels" in outputs["2"]["text"][0]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "missing.safetensors", "../input/x.safetensors"])
def test_names_outside_the_folders_are_rejected(server: ComfyServer, name: str) -> None:
    with pytest.raises((PromptRejected, PromptFailed)):
        server.run(preview(name))


def test_a_changed_file_is_read_again(server: ComfyServer, folder: Path) -> None:
    save(GOOD, folder / "changing.safetensors")
    assert "2 images" in server.run(preview("changing.safetensors"))["outputs"]["2"]["text"][0]
    save(from_images(torch.rand(3, 32, 32, 3)), folder / "changing.safetensors")
    assert "3 images" in server.run(preview("changing.safetensors"))["outputs"]["2"]["text"][0]


def test_tiny_images_are_refused(server: ComfyServer) -> None:
    with pytest.raises(PromptFailed, match="at least 8 pixels a side"):
        server.run(build(4, 4))


def test_huge_images_are_reduced(server: ComfyServer) -> None:
    """The image has 16,384 x 16,384 pixels, more than any model generates."""
    text = server.run(build(16384, 16384), timeout=300)["outputs"]["3"]["text"][0]
    assert "2048 x 2048 pixels" in text


def test_another_models_vae_is_named(server: ComfyServer) -> None:
    prompt = {
        "1": {"class_type": "SafeGuidanceLoadDemoModel", "inputs": {}},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": "pixel_space"}},
        "3": {"class_type": "SafeGuidanceLoadNegationSet", "inputs": {"name": "demo_hatched (bundled)"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red heart"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "6": {
            "class_type": "SafeGuidanceSafeDenoiserSampler",
            "inputs": {
                **{
                    "model": ["1", 0],
                    "positive": ["4", 0],
                    "negative": ["4", 0],
                    "latent_image": ["5", 0],
                    "vae": ["2", 0],
                },
                **{
                    "negation_set": ["3", 0],
                    "seed": 1,
                    "steps": 2,
                    "cfg": 5.0,
                    "sampler_name": "euler",
                    "scheduler": "normal",
                },
                **{
                    "denoise": 1.0,
                    "strength": 0.33,
                    "mode": "calibrated",
                    "start_sigma": 1000.0,
                    "end_sigma": 4.67,
                },
                **{"threshold": 0.4, "temperature": 0.1, "cap": 0.5, "effective_dimensions": 256},
            },
        },
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
    }
    with pytest.raises(
        PromptFailed, match="The VAE makes latents with 3 channels, the model samples 4. Connect the VAE"
    ):
        server.run(prompt)
    prompt["6"]["inputs"]["vae"] = ["1", 2]
    assert server.run(prompt)["outputs"]["7"]["images"]
