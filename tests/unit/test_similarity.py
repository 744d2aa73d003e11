"""Similarity with references.

Second derivations, chunks against the whole set, memory independent of the set's size.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safe_guidance.guidance.core import references as streaming
from safe_guidance.guidance.core.noise_level import NoiseLevel
from safe_guidance.guidance.core.references import References
from safe_guidance.guidance.safe_denoiser.likelihood_ratio import kernel_logits
from safe_guidance.guidance.safe_denoiser.settings import SafeDenoiserSettings
from safe_guidance.guidance.safe_denoiser.similarity import (
    closest,
    normalized_weights,
    reference_contrasts,
    reference_statistics,
    similarities,
)
from safe_guidance.guidance.safe_denoiser.whole_image import calibrated_correction

CPU = torch.device("cpu")


def latents(count: int, seed: int, channels: int = 4, height: int = 12, width: int = 10) -> Tensor:
    return (
        torch.randn(
            count, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        + 0.7
    )


def similarity(x: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
    references = References(z)
    return similarities(x, references, reference_contrasts(references, CPU, mask), mask)


def loop_similarity(x: Tensor, z: Tensor, region: Tensor) -> float:
    """Compute the weighted correlation a second time, with loops over channels."""
    top = square_x = square_z = 0.0
    for channel in range(len(x)):
        mean_x = (region * x[channel]).sum() / region.sum()
        mean_z = (region * z[channel]).sum() / region.sum()
        top += (region * (x[channel] - mean_x) * (z[channel] - mean_z)).sum().item()
        square_x += (region * (x[channel] - mean_x) ** 2).sum().item()
        square_z += (region * (z[channel] - mean_z) ** 2).sum().item()
    return top / math.sqrt(square_x * square_z)


@pytest.mark.parametrize("masked", [False, True])
def test_similarity_equals_loops(masked: bool) -> None:
    x, z = latents(3, 7), latents(4, 8)
    mask = (
        torch.rand(3, 1, 12, 10, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        if masked
        else None
    )
    measured = similarity(x, z, mask)
    for b in range(3):
        for n in range(4):
            region = torch.ones(12, 10, dtype=torch.float64) if mask is None else mask[b, 0]
            assert measured[b, n].item() == pytest.approx(loop_similarity(x[b], z[n], region), abs=1e-10)


def test_leave_one_out_equals_loops() -> None:
    z, temperature = latents(11, 3), 0.1
    soft_means = []
    for i in range(len(z)):
        others = torch.cat([z[:i], z[i + 1 :]])
        _, log_mean = normalized_weights(similarity(z[i : i + 1], others) / temperature)
        soft_means.append(temperature * log_mean)
    measured = reference_statistics(References(z), temperature, CPU).typical
    torch.testing.assert_close(measured, torch.cat(soft_means).median(), atol=1e-12, rtol=0)
    assert reference_statistics(References(z[:2]), temperature, CPU).typical == 0.5


@given(
    st.integers(1, 3),
    st.integers(1, 23),
    st.integers(1, 7),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=25, deadline=None)
def test_chunked_equals_whole(batch: int, count: int, at_a_time: int, dtype: torch.dtype) -> None:
    """Every quantity of every mode is the same for references read `at_a_time` and all at once."""
    x, stored = latents(batch, 1), latents(count, 2).to(dtype)
    x = x if dtype == torch.float64 else x.float()
    config, level = SafeDenoiserSettings(threshold=0.0), NoiseLevel.variance_exploding(8.0)

    def everything() -> list[Tensor]:
        references = References(stored, prepare=lambda z: 1.5 * z - 0.2)
        statistics = reference_statistics(references, 0.1, CPU)
        result = calibrated_correction(x, references, statistics, config)
        logits = kernel_logits(x, references, level, 0.5 * x)
        mean = references.mean(torch.softmax(logits, 1))
        return [
            statistics.contrast,
            statistics.typical,
            result.delta,
            result.similarity,
            logits,
            mean,
            *closest(x, references, 3),
        ]

    whole = everything()
    usual = streaming.CHUNK_ELEMENTS
    streaming.CHUNK_ELEMENTS = at_a_time * stored[0].numel()
    try:
        chunked = everything()
    finally:
        streaming.CHUNK_ELEMENTS = usual
    for a, b in zip(whole, chunked):
        torch.testing.assert_close(b, a, atol=1e-4 if x.dtype == torch.float32 else 1e-10, rtol=1e-4)


def test_references_without_weight_are_not_read() -> None:
    read: list[int] = []

    def remember(z: Tensor) -> Tensor:
        read.append(len(z))
        return z

    stored = latents(40, 2)
    weights = torch.zeros(1, 40, dtype=torch.float64)
    weights[0, 13] = 1
    usual = streaming.CHUNK_ELEMENTS
    streaming.CHUNK_ELEMENTS = 5 * stored[0].numel()
    try:
        mean = References(stored, prepare=remember).mean(weights)
    finally:
        streaming.CHUNK_ELEMENTS = usual
    assert torch.equal(mean[0], stored[13]) and read == [5]


def test_closest_finds_the_copy_and_orders_the_rest() -> None:
    z = latents(30, 4)
    # Brightness and contrast do not matter.
    values, indices = closest(torch.cat([2 * z[17:18] + 3, z[4:5]]), References(z), 3)
    assert indices[:, 0].tolist() == [17, 4]
    torch.testing.assert_close(values[:, 0], torch.ones(2, dtype=torch.float64))
    assert bool((values[:, :-1] >= values[:, 1:]).all())
    assert closest(z[:1], References(z[:2]), 9)[1].shape == (1, 2)


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """64 MB of latents mapped from a file: no tensor of their size is ever allocated."""
    count, shape = 2048, (4, 64, 64)
    path = tmp_path / "latents"
    with path.open("wb") as file:
        for seed in range(count // 256):
            file.write(
                torch.randn(256, *shape, generator=torch.Generator().manual_seed(seed))
                .half()
                .numpy()
                .tobytes()
            )
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    stored = torch.empty(0, dtype=torch.float16).set_(storage, 0, (count, *shape))
    references = References(stored)
    allocated: list[int] = []
    usual = streaming.References.read

    def watched(self: References, *args: object) -> Tensor:
        chunk = usual(self, *args)  # type: ignore[arg-type]
        allocated.append(chunk.numel())
        return chunk

    streaming.References.read = watched  # type: ignore[method-assign]
    try:
        x = references.latents[:2].float()
        contrast = reference_contrasts(references, CPU)
        assert similarities(x, references, contrast).argmax(1).tolist() == [0, 1]
    finally:
        streaming.References.read = usual  # type: ignore[method-assign]
    assert sum(allocated) == 2 * stored.numel()
    assert max(allocated) <= streaming.CHUNK_ELEMENTS


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_resident_and_streamed_references_agree(device: str, dtype: torch.dtype) -> None:
    """References in the device's memory and references streamed there give the same change, whatever type
    they are stored in.
    """
    place, x = torch.device(device), latents(2, 1).float()
    stored = References(latents(9, 2).to(dtype), prepare=lambda z: 0.5 * z + 0.1)
    resident = stored.resident(place)
    assert (
        resident.latents.device.type == device
        and resident.latents.dtype == dtype
        and resident.resident(place) is resident
    )

    def corrected(references: References) -> Tensor:
        statistics = reference_statistics(references, 0.1, place)
        return calibrated_correction(
            x.to(place), references, statistics, SafeDenoiserSettings(threshold=0.0)
        ).delta.cpu()

    # Rounding once more when they are placed.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(corrected(resident), corrected(stored), atol=tolerance, rtol=tolerance)
