"""The nodes around negation sets in the real host: folders, files, combinations, figures, look-ups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from safe_guidance.formats.negation_set import NegationSet, combined, from_images, load
from safe_guidance.reports.set_summary import summarize

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")

PROMPT = "a yellow star in the center on a black plain background, flat style"


@pytest.fixture
def folders(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an input folder and a model folder for this test, with five images, two of them equal, and a
    text file.
    """
    import folder_paths

    unwanted = tmp_path / "input" / "unwanted"
    (unwanted / "more").mkdir(parents=True)
    for index, place in enumerate(("a.png", "b.png", "more/c.jpg", "more/d.webp")):
        colours = torch.randint(
            0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8
        )
        Image.frombytes("RGB", (60, 40), colours.numpy().tobytes()).save(unwanted / place)
    (unwanted / "copy.png").write_bytes((unwanted / "a.png").read_bytes())
    (unwanted / "notes.txt").write_text("words")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "negation_sets", ([str(tmp_path / "sets")], {".safetensors"})
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def from_folder(**changed: Any) -> Any:
    from safe_guidance.nodes.negation_sets import NegationSetFromFolderNode

    given = {
        "folder": "unwanted",
        "sub_folders": True,
        "longest_side": 1024,
        "drop_duplicates": True,
        **changed,
    }
    return NegationSetFromFolderNode.execute(**given)


def test_from_folder(folders: Path) -> None:
    result = from_folder(source="my garden", licence="CC0")
    negation_set, report = result.args
    assert (len(negation_set), negation_set.name, negation_set.source) == (4, "unwanted", "my garden")
    assert report.splitlines() == [
        "4 images, 1 duplicates dropped, 1 files skipped",
        "notes.txt: not an image by its name",
    ]
    assert len(from_folder(sub_folders=False).args[0]) == 2
    assert len(from_folder(drop_duplicates=False).args[0]) == 5
    assert from_folder(longest_side=64, folder="unwanted/more").args[0].sizes() == [(60, 40)]


def test_folders_to_choose_from(folders: Path) -> None:
    from safe_guidance.nodes.negation_sets import NegationSetFromFolderNode

    inputs = {i.id: i for i in NegationSetFromFolderNode.define_schema().inputs}
    assert inputs["folder"].options == [".", "unwanted", "unwanted/more"]


def test_a_changed_folder_is_read_again(folders: Path) -> None:
    from safe_guidance.nodes.negation_sets import NegationSetFromFolderNode

    def fingerprint() -> str:
        return NegationSetFromFolderNode.fingerprint_inputs(
            folder="unwanted",
            sub_folders=True,
            longest_side=64,
            drop_duplicates=True,
            name="",
            source="",
            licence="",
        )

    before = fingerprint()
    assert fingerprint() == before
    os.utime(folders / "input" / "unwanted" / "a.png", (1, 1))
    assert fingerprint() != before


@pytest.mark.parametrize("name", ["../sets", "/etc", "unwanted/../../sets", "missing", "unwanted/a.png"])
def test_folders_elsewhere_are_refused(folders: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="under the host's input folder"):
        from_folder(folder=name)


def test_a_folder_without_images(folders: Path) -> None:
    (folders / "input" / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in the folder .it is empty."):
        from_folder(folder="empty")
    (folders / "input" / "empty" / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="a.png: no image, whatever its name says"):
        from_folder(folder="empty")


@pytest.mark.parametrize("in_memory", [2**30, 5_000])
def test_reading_can_be_interrupted(folders: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    import comfy.model_management
    import folder_paths

    from safe_guidance.formats import image_store
    from safe_guidance.nodes.host.files import image_folders

    temporary = folders / "temp"
    monkeypatch.setattr(folder_paths, "temp_directory", str(temporary))
    monkeypatch.setattr(image_store, "IN_MEMORY", in_memory)
    read = image_folders.read_images

    def then_interrupted(*inputs: Any) -> Iterator[Any]:
        found = list(read(*inputs))
        yield from found[:-1]
        comfy.model_management.interrupt_current_processing(True)
        yield found[-1]

    monkeypatch.setattr(image_folders, "read_images", then_interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        from_folder()
    comfy.model_management.interrupt_current_processing(False)
    assert not temporary.exists() or os.listdir(temporary) == []


def test_more_images_than_memory(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a limit the images are in a mapped file. The set is equal and can be saved."""
    import folder_paths

    from safe_guidance.formats import image_store

    in_memory = from_folder(drop_duplicates=False).args[0]
    monkeypatch.setattr(folder_paths, "temp_directory", str(folders / "temp"))
    monkeypatch.setattr(image_store, "IN_MEMORY", 10_000)
    mapped = from_folder(drop_duplicates=False).args[0]
    assert mapped.content_hash == in_memory.content_hash
    assert len({image.untyped_storage().data_ptr() for image in mapped.images}) == 1
    assert load(folders / "sets" / save(mapped, "large")).content_hash == in_memory.content_hash
    monkeypatch.setattr(
        image_store.ImageStore,
        "_flush",
        lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(
        ValueError, match="do not fit on the disk .No space left on device.. Lower longest_side"
    ):
        from_folder()


def save(negation_set: NegationSet, file_name: str, overwrite: bool = False) -> str:
    from safe_guidance.nodes.negation_set_files import SaveNegationSetNode

    name: str = SaveNegationSetNode.execute(negation_set, file_name, overwrite).args[0]
    return name


def test_saved_sets_are_found_by_load(folders: Path) -> None:
    from safe_guidance.nodes.host.files.folders import negation_set_names
    from safe_guidance.nodes.negation_set_files import LoadNegationSetNode

    negation_set = from_folder().args[0]
    assert save(negation_set, "mine/birds") == "mine/birds.safetensors"
    assert "mine/birds.safetensors" in negation_set_names()
    assert (
        LoadNegationSetNode.execute("mine/birds.safetensors").args[0].content_hash
        == negation_set.content_hash
    )
    # The same set again is the same file; another set gets a number, unless it may replace the first.
    assert save(negation_set, "mine/birds.safetensors") == "mine/birds.safetensors"
    other = from_images(torch.rand(2, 16, 16, 3))
    assert save(other, "mine/birds") == "mine/birds_002.safetensors"
    assert save(other, "mine/birds", overwrite=True) == "mine/birds.safetensors"
    assert load(folders / "sets" / "mine" / "birds.safetensors").content_hash == other.content_hash
    assert sorted(os.listdir(folders / "sets" / "mine")) == ["birds.safetensors", "birds_002.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["../x", "/tmp/x", "a/../../x", "", " ", "a//b", ".hidden", "a\\b", "a\0b", "nul:", "a/ /b", "dot."],
)
def test_names_that_no_file_may_have(folders: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot have the name"):
        save(from_images(torch.rand(1, 16, 16, 3)), name)
    assert not (folders / "sets").exists()


def test_combine(folders: Path) -> None:
    from safe_guidance.nodes.negation_sets import CombineNegationSetsNode

    first = from_folder().args[0]
    second = from_images(torch.rand(2, 16, 16, 3), name="new")
    assert len(CombineNegationSetsNode.execute(first, second, True, third=first).args[0]) == 6
    assert (
        len(CombineNegationSetsNode.execute(first, second, False, third=first, fourth=second).args[0]) == 12
    )


@pytest.mark.parametrize("with_vae", [False, True])
def test_preview_and_look_up(host: Any, with_vae: bool) -> None:
    from safe_guidance.nodes.negation_set_inspection import (
        FindClosestReferencesNode,
        PreviewNegationSetNode,
    )

    images = host.vae.decode(host.sample(host.model, host.text(PROMPT, PROMPT, PROMPT, PROMPT))).clone()
    negation_set = from_images(torch.cat([images, images[1:2].flip(2), images[1:2]]))
    vae = host.vae if with_vae else None
    summary = PreviewNegationSetNode.execute(negation_set, 64, vae).args[1]
    assert (
        "6 images (5 different)" in summary
        and "closest: 2 and 6 (1.00)" in summary
        and "calibration" in summary
    )
    sheet, found, highest = FindClosestReferencesNode.execute(images[2:4], negation_set, 2, vae).args
    assert found.splitlines()[0].startswith("image 1: reference 3 at 1.000") and found.splitlines()[
        1
    ].startswith("image 2: reference 4 at")
    assert highest == pytest.approx(1, abs=1e-3) and sheet.shape[0] == 1
    assert PreviewNegationSetNode.execute(from_images(images[:1]), 64, vae).args[1].count("\n") == 6


def test_preview_says_what_a_set_can_do_and_what_it_lacks() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:8, 4:8] = 1

    def said(*sets: NegationSet) -> str:
        return summarize(combined(sets), None)

    def whole(count: int) -> NegationSet:
        return from_images(torch.rand(count, 16, 16, 3))

    def with_masks(count: int, mask: torch.Tensor = mask) -> NegationSet:
        return from_images(torch.rand(count, 16, 16, 3), mask)

    few = said(with_masks(24))
    assert "masks: 24 mark a subject, 0 are empty (neutral images), 0 images are unwanted as a whole" in few
    assert "use: a subject anywhere" in few and "to do: add about 40 images without it" in few
    assert "to do" not in said(with_masks(64)) and "to do" not in said(
        with_masks(24), with_masks(40, 0 * mask)
    )
    assert "use: near-copies" in said(whole(2))
    assert "to do: for a subject at any position, paint masks" in said(whole(2))
    style = said(whole(3), with_masks(2, 0 * mask))
    assert "use: a style" in style
    assert "to do: add about 1 images in the style" in style and "add about 10 images without" in style
    assert "to do" not in said(whole(4), with_masks(12, 0 * mask))
    assert "use: none yet" in said(with_masks(3, 0 * mask))


def test_encoding_tells_its_progress(host: Any) -> None:
    import comfy.utils

    from safe_guidance.formats.layouts import Layout
    from safe_guidance.nodes.host.files.negation_latents import encode

    seen: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: seen.append((value, total))
    )
    try:
        encode(from_images(torch.rand(11, 64, 64, 3)), host.vae, 16, 16, Layout("crop", "flip"))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    # The host leaves out what follows too soon.
    assert seen[0] == (8, 22) and seen[-1] == (22, 22)


def test_latents_are_the_posteriors_mode(host: Any, tiny: Any) -> None:
    """The latent is the mean half of the encoder's moments, not a sample, for the demo VAE and a usual
    one.
    """
    from safe_guidance.nodes.host.files.negation_latents import encode_images

    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(encode_images(images, host.vae), encode_images(images, host.vae))
    vae = tiny.tiny_vae()
    found = encode_images(images, vae)
    network = vae.first_stage_model
    moments = network.quant_conv(network.encoder(images.movedim(-1, 1) * 2 - 1))
    torch.testing.assert_close(found, moments.chunk(2, dim=1)[0], atol=1e-4, rtol=1e-4)
