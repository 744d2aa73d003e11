"""Negation sets and their file: round trips, and one clear sentence for every kind of bad input."""

from __future__ import annotations

import base64
import os
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from safe_guidance.formats.layouts import Layout, fit, letterbox, pixels
from safe_guidance.formats.negation_set import (
    FORMAT,
    MAX_SIDE,
    NegationSet,
    from_images,
    load,
    save,
    without_duplicates,
)
from safe_guidance.reports.contact_sheet import CELL, GAP, contact_sheet


def images(count: int = 3, height: int = 24, width: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(0))


def test_round_trip(tmp_path: Path) -> None:
    masks = torch.zeros(3, 24, 32)
    masks[:, 4:9, 5:20] = 1
    built = from_images(images(), masks, "birds", "my garden", "CC0")
    save(built, tmp_path / "birds.safetensors")
    read = load(tmp_path / "birds.safetensors")
    assert (read.name, read.source, read.licence) == ("birds", "my garden", "CC0")
    assert all(torch.equal(a, b) for a, b in zip(read.images, built.images))
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(read.masks, built.masks))
    assert read.content_hash == built.content_hash
    assert os.listdir(tmp_path) == ["birds.safetensors"]


@given(st.integers(1, 4), st.integers(8, 40), st.integers(8, 40), st.booleans())
@settings(max_examples=25, deadline=None)
def test_round_trip_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, count: int, height: int, width: int, masked: bool
) -> None:
    path = tmp_path_factory.mktemp("sets") / "set.safetensors"
    built = from_images(images(count, height, width), torch.rand(count, 7, 9) if masked else None)
    save(built, path)
    read = load(path)
    assert read.content_hash == built.content_hash and len(read) == count


def test_images_of_different_sizes_live_in_one_file(tmp_path: Path) -> None:
    mixed = NegationSet(from_images(images(1)).images + from_images(images(1, 40, 16)).images, (None, None))
    save(mixed, tmp_path / "mixed.safetensors")
    assert load(tmp_path / "mixed.safetensors").sizes() == [(32, 24), (16, 40)]


def test_hash_depends_on_images_and_masks_only() -> None:
    built = from_images(images(), name="a")
    assert built.content_hash == from_images(images(), name="b", licence="CC0").content_hash
    assert built.content_hash != from_images(images() * 0.9).content_hash
    assert built.content_hash != from_images(images(), torch.ones(1, 24, 32)).content_hash


def test_more_than_ten_images_keep_their_order(tmp_path: Path) -> None:
    save(from_images(images(12)), tmp_path / "set.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(load(tmp_path / "set.safetensors").images, from_images(images(12)).images)
    )


def test_grey_and_alpha() -> None:
    grey = from_images(images(channels=1))
    assert torch.equal(grey.images[0][..., 0], grey.images[0][..., 2])
    rgba = images(channels=4)
    assert torch.equal(from_images(rgba).images[1], from_images(rgba[..., :3]).images[1])


def test_large_images_are_reduced_with_their_masks() -> None:
    large = from_images(torch.rand(1, 16, 16384, 3), torch.ones(1, 16, 16384))
    assert large.images[0].shape[1] == MAX_SIDE
    assert large.masks[0] is not None and large.masks[0].shape == large.images[0].shape[:2]


BAD_IMAGES = {
    "no images": (torch.zeros(0, 16, 16, 3), "no images"),
    "zero height": (torch.zeros(1, 0, 16, 3), "at least 8 pixels"),
    "tiny": (torch.zeros(1, 4, 4, 3), "at least 8 pixels"),
    "not a number": (torch.full((1, 16, 16, 3), torch.nan), "not numbers"),
    "infinite": (torch.full((1, 16, 16, 3), torch.inf), "not numbers"),
    "two channels": (torch.zeros(1, 16, 16, 2), "not grey, RGB or RGBA"),
    "no batch": (torch.zeros(16, 16, 3), "not grey, RGB or RGBA"),
}


@pytest.mark.parametrize(("bad", "sentence"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images(bad: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_images(bad)


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.zeros(2, 8, 8), "one mask, or one per image"),
        (torch.zeros(3, 0, 8), "one mask"),
        (torch.full((3, 8, 8), torch.nan), "not numbers"),
    ],
)
def test_bad_masks(mask: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_images(images(), mask)


GOLDEN = (
    "c-oDRWtY=H6oz+kch@jDq$QcOO<J7dy2xTn36spE4cjE8nF32Gi@UqKySux){2Z9{E9^NupYDCnz0WysQDH%zEKpU8P=pahstO`mpgT4tHdPbIO@IiHpn?fT"
    "0Z|W&FeGDW2(l(&2uZ*QheRkVkO-m}ltP9iNI^}LiKc4=3rG{Spn?GplBP~<oiJH6D)>adz%m<IUJ!SZnAmJLoV0}~OI&0SUp!-C#9la?#1S<en{x@}M0V#o"
    "nRH%76NID0r7p<vz(Q`RU&!NCz_cvo-4rX{M*?|EiNc3tJjnNS41@Vx77Dx!V@!}Tb(%?&|8Vfq-xeA2P*GyJ9LE*>i{Fe2h6*XHRJlskYSnAhtW~>C-Fo#K"
    "G;GwkNz-P{TeNJ|x=q`5?YR!1W2eqtx_0Z{qbKk4_Yy=X1%e@22}gSO>D#aWfPsUegNF<qHhjd$QKQF<9al7d!o*3%lc!9bHoas<Y^FL3X*woGJYmi*O<J~-"
    "nv-^EX70TCWec(kbBoFsFIl>5`HGdRR<BvRZvBRhn>KIRx^4T8ox67L*}HH5frEz*A31vL_=%IJPM<k@?)-&|mo8tqdhPm+o40P?xqI*agNKhEKY9A>`HPpY"
    "UcY(!?)`_4pFV&2`tAFVpTGV9awN@K"
)
"""A file of the format, compressed: what users keep must stay readable."""


def test_files_of_the_first_version_stay_readable(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(zlib.decompress(base64.b85decode(GOLDEN)))
    read = load(path)
    assert (len(read), read.sizes(), read.name, read.source, read.licence) == (
        1,
        [(9, 8)],
        "golden",
        "the tests",
        "CC0-1.0",
    )
    assert torch.equal(read.images[0].flatten(), (torch.arange(8 * 9 * 3) % 251).byte())
    assert read.masks[0] is not None and int((read.masks[0] > 0).sum()) == 12
    assert read.content_hash == "328deda41c91267d2f07b3d22e4f9612782e011536f3035bb7ebcbed0ab1b58d"


IMAGE = torch.zeros(16, 16, 3, dtype=torch.uint8)
BAD_FILES = {
    "of another format": ({"picture.000000": IMAGE}, {"format": "something else"}, "not a negation set"),
    "without metadata": ({"picture.000000": IMAGE}, None, "not a negation set"),
    "without images": ({}, {"format": FORMAT}, "no images"),
    "with floats": ({"picture.000000": IMAGE.float()}, {"format": FORMAT}, "not an 8-bit RGB image"),
    "with two channels": (
        {"picture.000000": IMAGE[..., :2].contiguous()},
        {"format": FORMAT},
        "not an 8-bit RGB image",
    ),
    "with an empty image": (
        {"picture.000000": IMAGE[:0].contiguous()},
        {"format": FORMAT},
        "Use images with sides",
    ),
    "with a huge image": (
        {"picture.000000": torch.zeros(8, 16384, 3, dtype=torch.uint8)},
        {"format": FORMAT},
        "16384 x 8 pixels",
    ),
    "with a gap": ({"picture.000001": IMAGE}, {"format": FORMAT}, "do not belong"),
    "with something else": (
        {"picture.000000": IMAGE, "weights": torch.zeros(3)},
        {"format": FORMAT},
        "do not belong",
    ),
    "with a stray mask": (
        {"picture.000000": IMAGE, "mask.000001": IMAGE[..., 0].contiguous()},
        {"format": FORMAT},
        "do not belong",
    ),
    "with a wrong mask": (
        {"picture.000000": IMAGE, "mask.000000": torch.zeros(8, 8, dtype=torch.uint8)},
        {"format": FORMAT},
        "size of its image",
    ),
}


@pytest.mark.parametrize(("tensors", "metadata", "sentence"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, sentence: str
) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=sentence) as raised:
        load(path)
    assert path.name in str(raised.value)


@pytest.mark.parametrize("keep", [0, 4, 100, 2000])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    save(from_images(images()), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(path)


@given(st.binary(min_size=0, max_size=300))
@settings(max_examples=50, deadline=None)
def test_any_bytes_are_refused_with_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="fuzz.safetensors"):
        load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.safetensors"
    save(from_images(images()), path)
    before = path.read_bytes()

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safe_guidance.formats.tensor_file.data", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(from_images(images(1)), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["set.safetensors"]


def test_a_text_that_could_not_be_read_again_is_refused() -> None:
    with pytest.raises(ValueError, match="The source of the negation set has more than 100000 characters"):
        from_images(images(1), source="s" * 100_001)


def test_a_name_that_no_file_can_hold_is_replaced(tmp_path: Path) -> None:
    save(from_images(images(1), name="a\udcffb"), tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").name == "a?b"


def test_a_loaded_set_survives_the_truncation_of_its_file(tmp_path: Path) -> None:
    """A file that was mapped into memory would end the process here."""
    path = tmp_path / "a.safetensors"
    save(from_images(images(9, 512, 512)), path)
    loaded, expected = load(path), from_images(images(9, 512, 512)).content_hash
    os.truncate(path, 0)
    assert loaded.content_hash == expected


def test_saving_needs_no_second_copy_of_the_set(tmp_path: Path) -> None:
    """A set may be larger than half of the memory, so its file is written image by image."""
    one = torch.zeros(1024, 1024, 3, dtype=torch.uint8)
    large = NegationSet((one,) * 64, (None,) * 64)
    tracemalloc.start()
    save(large, tmp_path / "large.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * one.numel()
    assert load(tmp_path / "large.safetensors").content_hash == large.content_hash


def test_fit_keeps_the_aspect_and_the_centre() -> None:
    image = torch.zeros(3, 40, 80)
    image[:, :, 20:60] = 1
    fitted = fit(image, 20, 20)
    assert fitted.shape == (3, 20, 20)
    # The white centre fills the square crop; the resampling filter may soften its border.
    assert fitted[:, 2:-2, 2:-2].min() > 0.99
    unchanged = torch.rand(3, 16, 24)
    torch.testing.assert_close(fit(unchanged, 16, 24), unchanged, atol=1e-5, rtol=0)


def test_images_and_masks_are_cropped_alike() -> None:
    image = torch.zeros(1, 32, 64, 3)
    image[:, 8:24, 24:40] = 1
    ((fitted, mask),) = pixels(from_images(image, image[..., 0]), 16, 16)
    assert mask is not None
    torch.testing.assert_close(fitted[:1], mask)


def test_letterbox_keeps_everything() -> None:
    image = torch.zeros(3, 40, 80)
    image[0] = 1
    boxed = letterbox(image, 40, 40, torch.tensor([0.0, 0.5, 0.0]))
    assert boxed.shape == (3, 40, 40)
    assert torch.equal(boxed[1, :10], torch.full((10, 40), 0.5)) and torch.equal(
        boxed[1, 30:], torch.full((10, 40), 0.5)
    )
    torch.testing.assert_close(boxed[0, 10:30], torch.ones(20, 40))
    (mine,) = pixels(
        from_images(torch.ones(1, 16, 64, 3), torch.ones(1, 16, 64)), 32, 32, Layout("letterbox")
    )
    assert mine[1] is not None and mine[1].mean().item() == pytest.approx(0.25)
    torch.testing.assert_close(mine[0], torch.ones(3, 32, 32))


@pytest.mark.parametrize(
    ("augmentation", "copies"),
    [("none", 1), ("flip", 2), ("flip and crops", 10), ("flip, crops and shifts", 18)],
)
def test_augmentation_moves_images_and_masks_alike(augmentation: str, copies: int) -> None:
    image = torch.zeros(1, 32, 48, 3)
    image[:, 4:12, 30:40] = 1
    layout = Layout("crop", augmentation)  # type: ignore[arg-type]
    found = list(pixels(from_images(image, image[..., 0]), 32, 48, layout))
    assert len(found) == copies == layout.copies
    for fitted, mask in found:
        assert mask is not None and fitted.shape == (3, 32, 48)
        torch.testing.assert_close(fitted[:1], mask)
    assert len({tuple(fitted.flatten().tolist()) for fitted, _ in found}) == copies
    torch.testing.assert_close(found[copies // 2][0], found[0][0].flip(-1) if copies > 1 else found[0][0])


def test_duplicates_are_dropped() -> None:
    doubled = from_images(torch.cat([images(), images()[:2]]), name="x")
    assert len(without_duplicates(doubled)) == 3
    assert without_duplicates(doubled).content_hash == from_images(images()).content_hash
    different_masks = from_images(
        images(1).expand(2, -1, -1, -1), torch.stack([torch.zeros(24, 32), torch.ones(24, 32)])
    )
    assert len(without_duplicates(different_masks)) == 2


def test_contact_sheet_dims_what_is_not_masked() -> None:
    white = torch.ones(5, 16, 16, 3)
    mask = torch.zeros(5, 16, 16)
    mask[:, :, 8:] = 1
    sheet = contact_sheet(from_images(white, mask), most=4)
    assert sheet.shape == (2 * (CELL + GAP) + GAP, 2 * (CELL + GAP) + GAP, 3)
    assert (
        sheet[GAP + CELL // 2, GAP + 10].max() < 0.4 and sheet[GAP + CELL // 2, GAP + CELL - 10].min() > 0.99
    )


def test_bundled_sets_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "assets" / "negation_sets"
    concept, style = load(folder / "demo_star.safetensors"), load(folder / "demo_hatched.safetensors")
    assert len(concept) >= 64 and all(mask is not None for mask in concept.masks)
    assert len(style) >= 4
    for bundled in (concept, style):
        assert bundled.source and bundled.licence
        assert len(without_duplicates(bundled)) == len(bundled)
