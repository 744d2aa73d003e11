"""Folders of any files: every usable image is read as it looks, every other file is listed with a reason,
and nothing raises.
"""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safe_guidance.formats import image_files
from safe_guidance.formats.image_files import Skipped, files_in, read_images


def gradient(width: int = 48, height: int = 32, mode: str = "RGB") -> Image.Image:
    """Make an image that gets redder to the right and greener downwards."""
    red = Image.linear_gradient("L").rotate(90).resize((width, height))
    green = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (red, green, Image.new("L", (width, height), 40))).convert(mode)


def encoded(format: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or gradient()).save(buffer, format, **options)
    return buffer.getvalue()


def read(
    folder: Path, longest_side: int = 1024, sub_folders: bool = True
) -> tuple[list[torch.Tensor], dict[str, str]]:
    found = list(read_images(folder, files_in(folder, sub_folders), longest_side))
    images = [f for f in found if not isinstance(f, Skipped)]
    return images, {f.path: f.reason for f in found if isinstance(f, Skipped)}


PNG, JPEG, GIF, WEBP, BMP = (encoded(format) for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP"))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.png", PNG)
    return buffer.getvalue()


def with_size(width: int, height: int) -> bytes:
    """Make a PNG whose header claims a size, with a valid checksum."""
    import zlib

    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return PNG[:8] + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]


BROKEN: dict[str, bytes] = {
    "empty.png": b"",
    "one_byte.png": b"\x89",
    "signature.png": PNG[:8],
    "header.png": PNG[:33],
    "half.png": PNG[: len(PNG) // 2],
    "checksum.png": PNG[:50] + bytes([PNG[50] ^ 255]) + PNG[51:],
    "no_size.png": with_size(0, 0),
    "bomb.png": with_size(100_000, 100_000),
    "half_a_bomb.png": with_size(12_000, 10_000),
    "other_size.png": with_size(4000, 4000),
    "half.jpg": JPEG[: len(JPEG) // 2],
    "marker.jpg": JPEG[:2],
    "tables.jpg": JPEG[:160],
    "half.webp": WEBP[: len(WEBP) // 2],
    "header.webp": WEBP[:12],
    "header.gif": GIF[:13],
    "no_frame.gif": GIF[:13] + b";",
    "half.gif": GIF[: len(GIF) // 3],
    "header.bmp": BMP[:14],
    "half.bmp": BMP[: len(BMP) // 2],
    "text.png": b"not an image at all",
    "page.jpg": b"<!doctype html><html><body>404</body></html>",
    "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EOF\n",
    "document.jpg": b"%PDF-1.7\n1 0 obj<<>>endobj\n%%EOF",
    "archive.png": zipped(),
    "program.png": b"\x7fELF" + bytes(200),
    "zeros.webp": bytes(4096),
    "noise.gif": random.Random(0).randbytes(4096),
    "lying_gif.gif": b"GIF89a" + random.Random(1).randbytes(400),
    "icon.png": encoded("ICO"),
    "tiff.png": encoded("TIFF"),
    "tiny.png": encoded("PNG", gradient(4, 4)),
    "thin.png": encoded("PNG", gradient(4000, 9)),
    "words.txt": b"a caption",
    "weights.safetensors": bytes(64),
    "no_suffix": PNG,
    "phone.heic": bytes(64),
}


def test_thirty_kinds_of_broken_files_are_listed_and_none_stops_the_rest(tmp_path: Path) -> None:
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "image.png").write_bytes(PNG)
    (tmp_path / "a_folder.png").mkdir()
    os.symlink("/etc/passwd", tmp_path / "outside.png")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling.png")
    os.mkfifo(tmp_path / "pipe.png")
    images, skipped = read(tmp_path)
    assert len(images) == 1
    assert set(skipped) == {*BROKEN, "outside.png", "dangling.png", "pipe.png"} and len(skipped) >= 30
    assert all(reason and "\n" not in reason and str(tmp_path) not in reason for reason in skipped.values())
    reasons = {
        "empty.png": "empty",
        "text.png": "no image, whatever its name says",
        "postscript.png": "no image, whatever its name says",
        "bomb.png": "more pixels than any model paints",
        "half_a_bomb.png": "more pixels than any model paints",
        "half.png": "damaged",
        "half.jpg": "damaged",
        "words.txt": "not an image by its name",
        "tiny.png": "4 x 4 pixels, a side needs at least 8",
        "outside.png": "a link that leads out of the folder",
        "pipe.png": "not a file",
    }
    for name, reason in reasons.items():
        assert reason in skipped[name], (name, skipped[name])


@given(st.sampled_from([PNG, JPEG, GIF, WEBP, BMP]), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_random_damage_never_raises(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, seed: int
) -> None:
    generator = random.Random(seed)
    damaged = bytearray(content)
    for _ in range(generator.randint(1, 30)):
        damaged[generator.randrange(len(damaged))] = generator.randrange(256)
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "a.png").write_bytes(damaged[: generator.randint(0, len(damaged))])
    images, skipped = read(folder)
    assert len(images) + len(skipped) == 1


GOOD: dict[str, Callable[[], bytes]] = {
    "a.png": lambda: PNG,
    "b.jpg": lambda: encoded("JPEG", quality=95),
    "c.jpeg": lambda: encoded("JPEG", gradient(mode="CMYK"), quality=95),
    "d.webp": lambda: encoded("WEBP", lossless=True),
    "e.gif": lambda: encoded("GIF", save_all=True, append_images=[Image.new("RGB", (48, 32))]),
    "f.bmp": lambda: BMP,
    "g.PNG": lambda: encoded("PNG", gradient(mode="P")),
    "h.png": lambda: encoded("PNG", gradient(mode="RGBA")),
    "i.webp": lambda: encoded(
        "WEBP", save_all=True, lossless=True, append_images=[Image.new("RGB", (48, 32))]
    ),
}


def test_images_look_as_they_should(tmp_path: Path) -> None:
    for name, make in GOOD.items():
        (tmp_path / name).write_bytes(make())
    images, skipped = read(tmp_path)
    assert not skipped and len(images) == len(GOOD)
    expected = torch.frombuffer(bytearray(gradient().tobytes()), dtype=torch.uint8).view(32, 48, 3).float()
    for name, image in zip(sorted(GOOD), images):
        assert image.shape == (32, 48, 3) and image.dtype == torch.uint8
        # A fixed palette and JPEG's losses move values by some steps.
        assert (image.float() - expected).abs().mean() < 20, name


def test_orientation_is_applied(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        (tmp_path / f"{orientation}.jpg").write_bytes(encoded("JPEG", exif=exif.tobytes(), quality=95))
    images, _ = read(tmp_path)
    assert [tuple(p.shape[:2]) for p in images] == [(32, 48)] * 4 + [(48, 32)] * 4
    upright, turned = images[0].float(), images[2].float()
    assert (turned - upright.flip(0, 1)).abs().mean() < 3


def test_sixteen_bit_images_keep_their_brightness(tmp_path: Path) -> None:
    values = (torch.arange(32 * 32).view(32, 32) * 64).to(torch.uint16)
    Image.frombytes("I;16", (32, 32), values.numpy().tobytes()).save(tmp_path / "deep.png")
    ((image,), _) = read(tmp_path)
    torch.testing.assert_close(image[..., 0].float(), values.float() / 257, atol=1, rtol=0)


def test_large_images_are_reduced(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG", gradient(300, 200)))
    (tmp_path / "b.jpg").write_bytes(encoded("JPEG", gradient(200, 300)))
    images, _ = read(tmp_path, longest_side=60)
    assert [tuple(p.shape[:2]) for p in images] == [(40, 60), (60, 40)]


def test_sub_folders_order_and_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for place in ("z.png", "b/y.png", "b/c/x.png", ".hidden/w.png", ".v.png"):
        (tmp_path / place).write_bytes(PNG)
    assert [p.relative_to(tmp_path).as_posix() for p in files_in(tmp_path, True)] == [
        "z.png",
        "b/y.png",
        "b/c/x.png",
    ]
    assert [p.name for p in files_in(tmp_path, False)] == ["z.png"]


@pytest.mark.parametrize("name", ["ünï.png", "a b 'c'.png", "new\nline.txt", b"invalid\xff.txt"])
def test_strange_names(tmp_path: Path, name: str | bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name if isinstance(name, bytes) else name.encode())
    with open(path, "wb") as file:
        file.write(PNG)
    images, skipped = read(tmp_path)
    assert len(images) + len(skipped) == 1
    assert all(path.encode("utf-8") for path in skipped)


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_FILES", 3)
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(PNG)
    with pytest.raises(ValueError, match="more than 3 files"):
        files_in(tmp_path, True)
