"""Example images for a server whose input folder is empty."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..formats.negation_set import load

SET = Path(__file__).resolve().parents[1] / "assets" / "negation_sets" / "demo_hatched.safetensors"
COUNT = 6


def write_example_images(folder: Path) -> None:
    """Write a few images of a bundled set into an input folder, unless it has files already."""
    if any(path.is_file() for path in folder.iterdir()):
        return
    for number, image in enumerate(load(SET).images[:COUNT]):
        Image.fromarray(image.numpy()).save(folder / f"hatched_{number + 1}.png")
