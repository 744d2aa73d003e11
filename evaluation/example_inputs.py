"""Pictures to load, for a server whose input folder is empty."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..formats.negation_set import load

SET = Path(__file__).resolve().parents[1] / "assets" / "negation_sets" / "demo_hatched.safetensors"
COUNT = 6


def put_sample_pictures(folder: Path) -> None:
    """Write a few pictures of a bundled set into an input folder, unless there are files in it already."""
    if any(path.is_file() for path in folder.iterdir()):
        return
    for number, picture in enumerate(load(SET).pictures[:COUNT]):
        Image.fromarray(picture.numpy()).save(folder / f"hatched_{number + 1}.png")
