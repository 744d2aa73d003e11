"""The artwork's sources: pinned, checked, and every author credited; training resumes where it stopped."""

from __future__ import annotations

import importlib
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from safe_guidance.demo.artwork_subjects import PHOTOGRAPHS, STYLES
from safe_guidance.tools.artwork_world import sources

ROOT = Path(__file__).resolve().parents[2]
CREDITS = (ROOT / "assets" / "artwork_world" / "CREDITS.md").read_text(encoding="utf-8")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Import a script of tools/artwork_world as it imports its neighbours."""
    own = {"training", "sources", "models", "make_sprites", "common", "networks"}
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools" / "artwork_world"), *sys.path])
    before = {name: sys.modules.pop(name) for name in own if name in sys.modules}

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in own:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def archive(path: Path, files: dict[str, bytes]) -> Path:
    """Write a gzipped tar archive."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_every_style_and_photograph_has_a_source() -> None:
    assert [source.style for source in sources.SOURCES] == list(STYLES)
    assert [photograph.name for photograph in sources.PHOTOGRAPHS] == list(PHOTOGRAPHS)


def test_credits_name_every_author_licence_and_version() -> None:
    for source in sources.SOURCES:
        cells = (f"`{source.style}`", source.title, source.author, source.licence)
        assert f"| {' | '.join(cells)} | `{source.package}` {source.version} |" in CREDITS
    for photograph in sources.PHOTOGRAPHS:
        cells = (f"`{photograph.name}`", photograph.title, photograph.author, photograph.licence)
        assert f"| {' | '.join(cells)} |" in CREDITS


def test_no_source_is_share_alike_and_licence_texts_are_there() -> None:
    licences = {source.licence for source in sources.SOURCES}
    assert licences == {"MIT", "Apache-2.0", "CC-BY-4.0"}
    folder = ROOT / "assets" / "artwork_world" / "licences"
    assert "Microsoft Corporation" in (folder / "MIT.txt").read_text(encoding="utf-8")
    assert "Apache License" in (folder / "Apache-2.0.txt").read_text(encoding="utf-8")


def test_another_archive_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    source = sources.SOURCES[0]
    (tmp_path / source.archive).write_bytes(b"something else")
    with pytest.raises(sources.SourceError, match="is not @lobehub/fluent-emoji-3d 1.1.0"):
        sources.fetch(source, tmp_path)


def test_a_missing_npm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(sources.SourceError, match="npm was not found. Install Node.js"):
        sources.fetch(sources.SOURCES[0], tmp_path)


def test_the_archives_have_the_names_that_npm_gives_them() -> None:
    assert sources.SOURCES[0].archive == "lobehub-fluent-emoji-3d-1.1.0.tgz"


def test_image_files_are_found_with_and_without_variation_selector(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(content, "WEBP", lossless=True)
    names = ("package/assets/1f4a3.webp", "package/assets/2694-fe0f.webp")
    found = sources.ImageArchive(archive(tmp_path / "a.tgz", {name: content.getvalue() for name in names}))
    assert found.read("1f4a3").getpixel((0, 0)) == found.read("2694").getpixel((0, 0)) == (255, 0, 0, 255)
    with pytest.raises(sources.SourceError, match="U[+]1F52A"):
        found.read("1f52a")


def test_svg_icons_are_found_through_aliases_with_their_own_size(tmp_path: Path) -> None:
    icons = {
        "icons": {"bomb": {"body": "<path/>", "width": 20}},
        "aliases": {"explosive": {"parent": "bomb"}},
        "height": 36,
    }
    files = {"package/icons.json": icons, "package/chars.json": {"1f4a3": "explosive"}}
    path = archive(tmp_path / "a.tgz", {name: json.dumps(value).encode() for name, value in files.items()})
    drawn = []

    def draw(svg: str) -> bytes:
        drawn.append(svg)
        content = io.BytesIO()
        Image.new("RGBA", (2, 2)).save(content, "PNG")
        return content.getvalue()

    assert sources.SvgArchive(path, draw).read("1f4a3").size == (2, 2)
    assert 'viewBox="0 0 20 36"' in drawn[0] and "<path/>" in drawn[0]


def test_photographs_are_pinned_and_can_be_read() -> None:
    data = pytest.importorskip("skimage.data")
    folder = Path(data.__file__).parent
    for photograph in sources.PHOTOGRAPHS:
        pixels = sources.read_photograph(photograph, folder)
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and min(pixels.shape[:2]) >= 80


def test_another_photograph_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grass.png").write_bytes(b"something else")
    with pytest.raises(sources.SourceError, match="not the pinned photograph"):
        sources.read_photograph(sources.PHOTOGRAPHS[0], tmp_path)


def test_a_sprite_is_cut_to_its_outline_and_keeps_its_proportions(tool) -> None:  # type: ignore[no-untyped-def]
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 128, 0, 255), (10, 20, 50, 40))
    sprite = tool("make_sprites").make_sprite(image, 32)
    assert sprite.shape == (4, 32, 32)
    assert (sprite[3, 8:24] == 255).all() and not sprite[:, :7].any() and not sprite[:, 25:].any()
    assert (sprite[:3] <= sprite[3:]).all()


def test_the_learning_rate_warms_up_stays_and_falls(tool) -> None:  # type: ignore[no-untyped-def]
    scale = tool("training").learning_rate_scale
    values = [scale(step, 100, 10, 0.5) for step in (0, 9, 30, 50, 75, 100)]
    assert values == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.01])


def test_a_resumed_run_ends_where_an_unbroken_one_does(tool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    training = tool("training")

    def make(name: str):  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
        return training.Run(tmp_path / name, module, ("2.",), ema_decay=0.9)

    def go(run, steps: int) -> None:  # type: ignore[no-untyped-def]
        for _ in range(steps):
            run.optimizer.set_scale(1.0)
            run.advance((run.module(torch.randn(16, 4)) - 1).square().mean())

    unbroken = make("a")
    go(unbroken, 6)
    broken = make("b")
    go(broken, 3)
    broken.save()
    torch.manual_seed(99)
    resumed = make("b")
    resumed.resume()
    assert resumed.step == 3
    go(resumed, 3)
    for name, value in unbroken.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name])
    for name, value in unbroken.averaged().items():
        assert torch.equal(value, resumed.averaged()[name])


def test_the_trained_networks_fit_the_bundle(tool) -> None:  # type: ignore[no-untyped-def]
    models = tool("models")
    networks = (models.Diffusion(300), models.make_autoencoder())
    size = 2 * sum(p.numel() for network in networks for p in network.parameters())
    assert size < 20e6
    prediction = networks[0](
        torch.randn(1, 4, 32, 32), torch.tensor([5]), torch.zeros(1, 77, dtype=torch.long)
    )
    assert prediction.shape == (1, 4, 32, 32)
