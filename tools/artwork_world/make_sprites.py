"""Fetch the artwork, draw every subject in every style at one size, and store all of it in sprites.npz.

Needs npm for the packages, resvg-py (requirements.txt beside this script) for SVG files, and scikit-image for
the photographs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import training
from sources import (
    PHOTOGRAPHS,
    SOURCES,
    ImageArchive,
    SourceError,
    SvgArchive,
    artwork_folder,
    fetch,
    read_photograph,
)

subjects = training.pack_module("demo.artwork_subjects")
VISIBLE = 8
"""Alpha from which on a pixel belongs to an emoji when its margins are cut off."""


def render_svg(svg: str) -> bytes:
    """Draw an SVG file as PNG.

    Raises:
        SourceError: resvg-py is missing.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise SourceError(
            "resvg-py is missing: pip install --require-hashes -r tools/artwork_world/requirements.txt"
        ) from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg))


def make_sprite(image: Image.Image, size: int) -> np.ndarray:
    """Cut an emoji's margins off and fit it into a square.

    Args:
        image: RGBA.
        size: side of the square in pixels.

    Returns:
        (4, size, size) uint8: red, green, blue (multiplied by alpha) and alpha.
    """
    box = image.getchannel("A").point(lambda alpha: 255 if alpha >= VISIBLE else 0).getbbox()
    image = image.crop(box)
    scale = size / max(image.size)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    pixels = np.asarray(image, dtype=np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    channels = [
        np.asarray(Image.fromarray(pixels[..., c]).resize((width, height), Image.Resampling.LANCZOS))
        for c in range(4)
    ]
    sprite = np.zeros((4, size, size), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    fitted = np.clip(np.stack(channels), 0, 255)
    fitted[:3] = np.minimum(fitted[:3], fitted[3:])
    sprite[:, top : top + height, left : left + width] = np.round(fitted)
    return sprite


def main() -> None:
    """Fetch, draw and store the artwork."""
    parser = training.argument_parser(__doc__, steps=0, batch=0)
    parser.add_argument("--packages", type=Path, default=artwork_folder() / "packages")
    parser.add_argument("--size", type=int, default=192, help="side of a sprite in pixels")
    args = parser.parse_args()
    training.start(args)
    import skimage.data

    arrays: dict[str, np.ndarray] = {}
    for source in SOURCES:
        path = fetch(source, args.packages)
        archive = ImageArchive(path) if source.style == "3d" else SvgArchive(path, render_svg)
        for subject in subjects.SUBJECTS:
            arrays[f"{source.style}/{subject.name}"] = make_sprite(archive.read(subject.code), args.size)
        training.log.info("%s: %d subjects", source.title, len(subjects.SUBJECTS))
    folder = Path(skimage.data.__file__).parent
    for photograph in PHOTOGRAPHS:
        arrays[f"photograph/{photograph.name}"] = read_photograph(photograph, folder).transpose(2, 0, 1)
    with training.atomic(args.work / "sprites.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    training.log.info("sprites.npz: %.1f MB", (args.work / "sprites.npz").stat().st_size / 1e6)


if __name__ == "__main__":
    main()
