"""The file of encoded references: golden bytes, round trips, and every kind of damage is noticed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from safe_guidance.formats import latent_file


def batches(
    count: int, at_a_time: int = 2, masked: bool = False, shape: tuple[int, ...] = (4, 6, 5)
) -> Iterator[tuple[Tensor, Tensor | None]]:
    values = torch.arange(count * torch.Size(shape).numel()).view(count, *shape).half() / 8
    regions = (
        (torch.arange(count * shape[1] * shape[2]) % 3 / 2).view(count, 1, *shape[1:]) if masked else None
    )
    for start in range(0, count, at_a_time):
        part = slice(start, start + at_a_time)
        yield values[part].float(), None if regions is None else regions[part]


@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.tuples(st.integers(1, 16), st.integers(1, 9), st.integers(1, 9)),
)
@settings(max_examples=25, deadline=None)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, count: int, at_a_time: int, masked: bool, shape: tuple[int, ...]
) -> None:
    path = tmp_path_factory.mktemp("latents") / "a.latents"
    latent_file.write(path, "key", count, batches(count, at_a_time, masked, shape))
    found = latent_file.read(path, "key")
    (whole,) = batches(count, count, masked, shape)
    assert torch.equal(found.latents, whole[0].half())
    assert (found.regions is None) == (whole[1] is None)
    if found.regions is not None and whole[1] is not None:
        assert torch.equal(found.regions, whole[1].half())
    assert os.listdir(path.parent) == ["a.latents"]


def test_the_format_is_safetensors_and_stays_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.latents"
    latent_file.write(path, "set 32x32", 3, batches(3, masked=True))
    tensors = load_file(path)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "latents": ((3, 4, 6, 5), torch.float16),
        "regions": ((3, 1, 6, 5), torch.float16),
    }
    # A file that an earlier version of the pack wrote must stay readable.
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest()
        == "b232f7ba1742e74c36fd9bd520c0acbc65485a5e829a8f8c5e749b99b7c73673"
    )


def test_another_key_is_not_served(tmp_path: Path) -> None:
    latent_file.write(tmp_path / "a.latents", "key", 3, batches(3))
    with pytest.raises(ValueError, match="holds something else"):
        latent_file.read(tmp_path / "a.latents", "other key")


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """This covers header, checksum, numbers and padding: a file with another byte is refused or reads
    the same.
    """
    path = tmp_path / "a.latents"
    latent_file.write(path, "key", 2, batches(2, shape=(1, 2, 2)))
    good = path.read_bytes()
    expected = latent_file.read(path, "key").latents.clone()
    for place in range(len(good)):
        damaged = tmp_path / f"{place}.latents"
        damaged.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            assert torch.equal(latent_file.read(damaged, "key").latents, expected), place
        except ValueError:
            pass


@pytest.mark.parametrize("keep", [0, 7, 8, 50, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.latents"
    latent_file.write(path, "key", 3, batches(3))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        latent_file.read(path, "key")


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.latents"
    for tensors in (
        {"latents": torch.zeros(2, 4, 6, 5)},
        {"latents": torch.zeros(2, 4, 6).half()},
        {"regions": torch.zeros(2, 1, 6, 5).half()},
        {"latents": torch.zeros(2, 4, 6, 5).half(), "more": torch.zeros(1)},
        {"latents": torch.zeros(2, 4, 6, 5).half(), "regions": torch.zeros(3, 1, 6, 5).half()},
    ):
        save_file(tensors, path, metadata={"format": latent_file.FORMAT, "key": "key"})
        with pytest.raises(ValueError):
            latent_file.read(path, "key")


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[Tensor, Tensor | None]]:
        yield next(batches(4))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latent_file.write(tmp_path / "a.latents", "key", 4, interrupted())
    assert os.listdir(tmp_path) == []


def test_a_missing_file_is_just_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        latent_file.read(tmp_path / "a.latents", "key")


WRITER = """
import importlib.util, sys, torch
from pathlib import Path
root, path = Path(sys.argv[1]), Path(sys.argv[2])
init = root / "__init__.py"
spec = importlib.util.spec_from_file_location("safe_guidance", init, submodule_search_locations=[str(root)])
sys.modules["safe_guidance"] = importlib.util.module_from_spec(spec)
from safe_guidance.formats import latent_file
for round in range(30):
    latent_file.write(path, "key", 64, ((torch.full((8, 4, 16, 16), float(i)), None) for i in range(8)))
    found = latent_file.read(path, "key")
    assert found.latents[:, 0, 0, 0].tolist() == [float(i // 8) for i in range(64)]
"""


def test_two_processes_build_the_same_file(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    path = tmp_path / "a.latents"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root), str(path)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(latent_file.read(path, "key")) == 64
    assert os.listdir(tmp_path) == ["a.latents"]
