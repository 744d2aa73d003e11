"""Encoded sets on disk in the real host.

Found again by another VAE object with the same weights, never trusted when damaged.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safe_guidance.formats.layouts import Layout
from safe_guidance.formats.negation_set import from_images

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


@pytest.fixture
def cache(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module under test with a folder of its own, and the calls of the VAE's encoder."""
    import folder_paths

    from safe_guidance.nodes.host.files import latent_cache, negation_latents

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    monkeypatch.setattr(negation_latents, "_encodings", type(negation_latents._encodings)())
    calls: list[int] = []
    encode = host.vae.encode
    monkeypatch.setattr(host.vae, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))

    def forget() -> None:
        negation_latents._encodings.clear()
        calls.clear()

    return SimpleNamespace(
        module=latent_cache,
        encode=lambda *inputs: negation_latents.encode(*inputs),
        calls=calls,
        forget=forget,
        folder=latent_cache.directory,
    )


def make_images(count: int = 3, seed: int = 0, masked: bool = False) -> Any:
    mask = torch.zeros(count, 48, 64)
    mask[:, 8:24, 8:40] = 1
    return from_images(
        torch.rand(count, 48, 64, 3, generator=torch.Generator().manual_seed(seed)), mask if masked else None
    )


@pytest.mark.parametrize("masked", [False, True])
def test_a_set_is_encoded_once_for_all_processes(host: Any, cache: Any, masked: bool) -> None:
    first = cache.encode(make_images(11, masked=masked), host.vae, 32, 32)
    assert cache.calls == [8, 3]
    assert [path.suffix for path in cache.folder().iterdir()] == [".latents"]
    cache.forget()
    again = cache.encode(make_images(11, masked=masked), host.vae, 32, 32)
    assert cache.calls == []
    assert again is not first and torch.equal(again.latents, first.latents)
    assert (again.regions is None) == (not masked)
    if again.regions is not None:
        assert torch.equal(again.regions, first.regions)


def test_every_ingredient_has_its_own_file(host: Any, cache: Any) -> None:
    from safe_guidance.nodes.host.files.demo_model import load_demo_model

    cache.encode(make_images(), host.vae, 32, 32)
    cache.encode(make_images(seed=1), host.vae, 32, 32)
    cache.encode(make_images(), host.vae, 32, 24)
    cache.encode(make_images(), host.vae, 32, 32, Layout("letterbox"))
    flipped = cache.encode(make_images(), host.vae, 32, 32, Layout("crop", "flip"))
    assert len(list(cache.folder().iterdir())) == 5 and len(flipped) == 6
    # The same weights in another object are the same VAE; other weights are another.
    _, _, other = load_demo_model()
    assert cache.module.vae_hash(other) == cache.module.vae_hash(host.vae)
    changed = next(iter(other.first_stage_model.parameters()))
    changed.data = changed.data + 1
    cache.module._hashes.clear()
    assert cache.module.vae_hash(other) != cache.module.vae_hash(host.vae)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_file_is_replaced(
    host: Any, cache: Any, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = cache.encode(make_images(), host.vae, 32, 32).latents.clone()
    (path,) = cache.folder().iterdir()
    whole = path.read_bytes()
    broken = {
        "truncated": whole[:-9],
        "flipped": whole[:-9] + b"\x7f" + whole[-8:],
        "empty": b"",
        "other": b"{}" * 400,
    }[damage]
    path.unlink()
    path.write_bytes(broken)
    cache.forget()
    with caplog.at_level(logging.WARNING):
        again = cache.encode(make_images(), host.vae, 32, 32)
    assert "encoded again" in caplog.text
    assert torch.equal(again.latents, good) and cache.calls == [3]
    assert path.read_bytes() == whole


def test_interrupting_leaves_no_file(host: Any, cache: Any) -> None:
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        cache.encode(make_images(20), host.vae, 32, 32)
    comfy.model_management.interrupt_current_processing(False)
    assert list(cache.folder().iterdir()) == []


def test_the_files_not_used_for_longest_go_first(
    host: Any, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        cache.encode(make_images(seed=seed), host.vae, 32, 32)
    ages = {path: age for age, path in enumerate(sorted(cache.folder().iterdir()))}
    for path, age in ages.items():
        os.utime(path, (10**9 + age, 10**9 + age))
    (cache.folder() / ".safe_guidance.00ff.tmp").write_bytes(b"x")
    os.utime(cache.folder() / ".safe_guidance.00ff.tmp", (10**9, 10**9))
    size = next(iter(ages)).stat().st_size
    monkeypatch.setattr(cache.module, "LIMIT", int(2.5 * size))
    cache.encode(make_images(seed=3), host.vae, 32, 32)
    left = set(cache.folder().iterdir())
    assert len(left) == 2 and max(ages, key=lambda path: ages[path]) in left


def test_without_a_place_to_keep_them_latents_stay_in_memory(
    host: Any, cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(cache.module, "directory", lambda: tmp_path / "file" / "latents")
    with caplog.at_level(logging.WARNING):
        found = cache.encode(make_images(), host.vae, 32, 32)
    assert len(found) == 3 and "stay in memory" in caplog.text


def test_values_that_are_not_numbers_are_refused(
    host: Any, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.vae, "encode", lambda pixels: torch.full((len(pixels), 4, 32, 32), torch.nan))
    with pytest.raises(ValueError, match="not numbers from an image"):
        cache.encode(make_images(), host.vae, 32, 32)
    monkeypatch.setattr(host.vae, "encode", lambda pixels: torch.zeros(1, 4, len(pixels), 32, 32))
    with pytest.raises(ValueError, match="not one latent image"):
        cache.encode(make_images(seed=5), host.vae, 32, 32)
