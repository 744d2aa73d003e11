"""Saving negation sets and guideline tokens: names, folders and disks that are in the way."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safe_guidance.formats.image_store import ImageStore
from safe_guidance.formats.negation_set import NegationSet, from_images, load
from safe_guidance.guidance.detect_and_guide.guideline_tokens import GuidelineTokens

SETS, TOKENS = "negation_sets", "guideline_tokens"
IMAGES = torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def models(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models, empty."""
    import folder_paths

    for kind in (SETS, TOKENS):
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"})
        )
    return tmp_path


def make_set(index: int = 0, name: str = "a set") -> NegationSet:
    return from_images(IMAGES[index : index + 1], name=name)


def make_tokens() -> GuidelineTokens:
    return GuidelineTokens(torch.zeros(2, 4), words="a star")


def saver(kind: str) -> Callable[[str, bool], str]:
    from safe_guidance.nodes.host.files import saving

    if kind == SETS:
        return lambda name, overwrite: saving.save_negation_set(make_set(), name, overwrite)
    return lambda name, overwrite: saving.save_guideline_tokens(make_tokens(), name, overwrite)


def test_a_number_is_appended_to_a_name_that_another_set_has(models: Path) -> None:
    from safe_guidance.nodes.host.files.saving import save_negation_set

    assert save_negation_set(make_set(0), "x", False) == "x.safetensors"
    assert save_negation_set(make_set(1), "x", False) == "x_002.safetensors"
    assert save_negation_set(make_set(0, "other words"), "x", False) == "x.safetensors"
    assert load(models / SETS / "x.safetensors").name == "other words"
    assert save_negation_set(make_set(2), "x", True) == "x.safetensors"
    assert len(list((models / SETS).iterdir())) == 2


@pytest.mark.parametrize("kind", [SETS, TOKENS])
@pytest.mark.parametrize(
    "name",
    ["CON", "nul", "Aux.old", "com1", "LPT9.x/y", "a/prn", "trailing./x", "a\\b", "a:b", "a\x7fb", "a\nb"]
    + ["\udcff", "a\x00b", "..", "a//b", "", " ", ".safetensors"],
)
def test_names_that_some_system_refuses_are_refused_everywhere(models: Path, kind: str, name: str) -> None:
    with pytest.raises(ValueError, match="A file cannot have the name"):
        saver(kind)(name, False)
    assert list(models.rglob("*")) == []


@pytest.mark.parametrize("kind", [SETS, TOKENS])
@pytest.mark.parametrize("name", ["x" * 201, "é" * 101, "/".join("a" * 17), "x/" + "y" * 5000])
def test_names_that_are_too_long_are_refused(models: Path, kind: str, name: str) -> None:
    with pytest.raises(ValueError, match="is too long for a file. Use at most") as raised:
        saver(kind)(name, False)
    assert len(str(raised.value)) < 300 and list(models.rglob("*")) == []


@pytest.mark.parametrize("kind", [SETS, TOKENS])
@pytest.mark.parametrize("name", ["x" * 200, "é" * 100, "/".join("a" * 16), "con2", "nulls", "a b.c"])
def test_unusual_names_that_work_are_kept(models: Path, kind: str, name: str) -> None:
    assert saver(kind)(name, False) == f"{name}.safetensors"
    assert saver(kind)(name, True) == f"{name}.safetensors"
    assert (models / kind / f"{name}.safetensors").is_file()


@pytest.mark.parametrize("kind", [SETS, TOKENS])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_have_the_usual_rights(models: Path, kind: str, overwrite: bool) -> None:
    before = os.umask(0o022)
    try:
        saver(kind)("a/b", overwrite)
    finally:
        os.umask(before)
    assert stat.S_IMODE((models / kind / "a" / "b.safetensors").stat().st_mode) == 0o644


def test_a_folder_in_place_of_the_file(models: Path) -> None:
    (models / SETS / "x.safetensors").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="'x' cannot be saved in models/negation_sets: a folder has that name"
    ):
        saver(SETS)("x", True)
    assert saver(SETS)("x", False) == "x_002.safetensors"


def test_a_file_in_place_of_a_folder(models: Path) -> None:
    (models / SETS).mkdir()
    (models / SETS / "x").write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="'x/y' cannot be saved in models/negation_sets: ") as raised:
            saver(SETS)("x/y", overwrite)
        assert "Errno" not in str(raised.value) and str(models) not in str(raised.value)
    assert [path.name for path in (models / SETS).iterdir()] == ["x"]


def test_a_full_disk_is_told_and_leaves_nothing(models: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        for kind in (SETS, TOKENS):
            with pytest.raises(
                ValueError, match=f"'a/b' cannot be saved in models/{kind}: the file is larger"
            ):
                saver(kind)("a/b", False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(models.rglob("*")) == []


def test_a_read_only_folder_is_told(models: Path) -> None:
    """Root may write everywhere, except into a folder that the file system protects."""
    folder = models / SETS
    folder.mkdir()
    folder.chmod(0o555)
    if (
        os.geteuid() == 0
        and subprocess.run(["chattr", "+i", folder], check=False, capture_output=True).returncode
    ):
        pytest.skip("nothing keeps root from writing here")
    try:
        with pytest.raises(
            ValueError, match="there is no permission to write there. Make the folder writable"
        ):
            saver(SETS)("x", False)
    finally:
        subprocess.run(["chattr", "-i", folder], check=False, capture_output=True)
    assert list(folder.iterdir()) == []


def test_a_set_with_any_name_can_be_loaded_again(models: Path) -> None:
    from safe_guidance.nodes.host.files.saving import save_negation_set

    saved = save_negation_set(make_set(name="\udcff half \ud800 <b>\n\x00"), "strange", False)
    assert load(models / SETS / saved).name == "? half ? <b>\n\x00"


def test_files_whose_names_are_no_text_are_not_listed(models: Path) -> None:
    from safe_guidance.nodes.host.files.folders import file_names, file_path

    saver(SETS)("good", False)
    (models / SETS / "good.safetensors").rename(
        os.fsdecode(os.fsencode(models / SETS) + b"/\xff.safetensors")
    )
    assert not [name for name in file_names(SETS) if "\udcff" in name]
    for name in ("\udcff.safetensors", "a\x00b", "x" * 10_000, "../" * 50 + "etc/passwd"):
        with pytest.raises(FileNotFoundError, match="There is no negation set named"):
            file_path(SETS, name)


def test_a_disk_that_fills_up_at_the_last_image_is_cleaned(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last images are written when the folder has been read, and some when the file is closed."""
    from PIL import Image

    from safe_guidance.formats import image_store
    from safe_guidance.nodes.host.files import image_folders

    folder, temporary = models / "input", models / "temp"
    folder.mkdir()
    for index in range(5):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(folder / f"{index}.png")
    monkeypatch.setattr(image_store, "IN_MEMORY", 3 * 64 * 64 * 3)
    monkeypatch.setattr(image_folders.folder_paths, "temp_directory", str(temporary))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (4 * 64 * 64 * 3 + 10, 4 * 64 * 64 * 3 - 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(ValueError, match="The images do not fit on the disk .* Lower longest_side"):
                image_folders.read_folder(folder, False, 64, "", "", "")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(temporary.iterdir()) == []


def test_a_discarded_store_closes_its_file_on_a_full_disk(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)

    class Full:
        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    store._file = Full()  # type: ignore[assignment]
    store._path = str(tmp_path / "x.images")
    (tmp_path / "x.images").write_bytes(b"x")
    store.discard()
    assert list(tmp_path.iterdir()) == []
