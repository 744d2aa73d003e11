"""Sparse Repellency in the real host: where it acts, identity, batches, families without a set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from demo_prompts import HEART, STAR
from safe_guidance.formats.negation_set import NegationSet, from_images

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


@pytest.fixture(scope="module")
def copies(host: Any) -> NegationSet:
    """Return a set whose only reference is the image that the model samples for STAR with seed 1."""
    with torch.inference_mode():
        return from_images(host.vae.decode(host.sample(host.model, host.text(STAR))).clone())


def repel(host: Any, negation_set: NegationSet | None = None, **settings: Any) -> Any:
    from safe_guidance.nodes.spell import SparseRepellencyNode

    return SparseRepellencyNode.execute(
        model=host.model, vae=host.vae, negation_set=negation_set, **settings
    ).args[0]


def after(host: Any, *earlier: torch.Tensor, **settings: Any) -> Any:
    """Attach SPELL with latents of earlier batches and no set."""
    from safe_guidance.nodes.spell import SparseRepellencyNode

    settings = {"overcompensation": 1.0, "cap": 10.0, **settings}
    return SparseRepellencyNode.execute(
        model=host.model, earlier={"samples": torch.cat(earlier)}, **settings
    ).args[0]


def between(host: Any, a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the root mean square distance of two latents in the sampler's space."""
    space = host.model.get_model_object("latent_format").process_in
    return float((space(a) - space(b)).square().mean().sqrt())


def distances(host: Any, samples: torch.Tensor, negation_set: NegationSet) -> torch.Tensor:
    """Return the distance of every sample to its closest reference: root mean square, in the sampler's
    space.
    """
    from safe_guidance.nodes.host.engine.frames import Frames
    from safe_guidance.nodes.host.files.negation_latents import references_for

    frames = Frames.of([samples.shape])
    references = references_for(host.model, host.vae, negation_set, frames).read(slice(None))
    x = host.model.get_model_object("latent_format").process_in(samples)
    return torch.cdist(x.flatten(1), references.flatten(1)).amin(1) / x[0].numel() ** 0.5


def test_an_image_leaves_the_ball_and_nothing_else_changes(host: Any, copies: NegationSet) -> None:
    text = host.text(STAR, HEART)
    baseline = host.sample(host.model, text)
    near, far = distances(host, baseline, copies).tolist()
    radius = (near + far) / 2
    protected = host.sample(repel(host, copies, radius=radius, overcompensation=1.0), text)
    assert torch.equal(protected[1], baseline[1])
    # The last prediction of a sampler is its result: it is outside, but for the rounding of half precision.
    assert distances(host, protected, copies)[0].item() >= 0.99 * radius


@pytest.mark.parametrize(
    "settings",
    [
        {"radius": 0.0},
        {"overcompensation": 0.0},
        {"radius": 0.001},
        {"end_sigma": 500.0},
        {"window": "percent", "end_percent": 0.0},
    ],
)
def test_identity_is_bit_exact(host: Any, copies: NegationSet, settings: dict[str, Any]) -> None:
    text = host.text(STAR, HEART)
    counted, rows = host.count_calls(repel(host, copies, **{"among_batch": True, "radius": 0.01, **settings}))
    plain, plain_rows = host.count_calls(host.model)
    assert torch.equal(host.sample(counted, text), host.sample(plain, text)) and rows == plain_rows


def test_samples_of_a_batch_repel_each_other(host: Any) -> None:
    text = host.text(STAR, STAR, STAR)

    def apart(samples: torch.Tensor) -> float:
        return torch.pdist(samples.flatten(1)).min().item() / samples[0].numel() ** 0.5

    baseline = host.sample(host.model, text)
    assert apart(host.sample(repel(host, among_batch=True, radius=2.0), text)) > apart(baseline)
    alone = host.text(STAR)
    assert torch.equal(
        host.sample(repel(host, among_batch=True, radius=2.0), alone), host.sample(host.model, alone)
    )


def test_a_later_batch_keeps_away_from_an_earlier_one(host: Any) -> None:
    """An image with the same prompt and seed moves away; a distant image stays bit-identical."""
    first = host.sample(host.model, host.text(STAR))
    text = host.text(STAR, HEART)
    plain = host.sample(host.model, text)
    near, far = between(host, plain[0], first[0]), between(host, plain[1], first[0])
    radius = (near + far) / 2
    second = host.sample(after(host, first, radius=radius), text)
    assert near < 0.2 * far and between(host, second[0], first[0]) >= 0.99 * radius
    assert torch.equal(second[1], plain[1])


def test_every_batch_of_a_chain_keeps_away_from_all_before_it(host: Any) -> None:
    text, radius = host.text(STAR), 0.25
    batches = [host.sample(host.model, text)]
    for _ in range(2):
        batches.append(host.sample(after(host, *batches, radius=radius), text))
    apart = [between(host, batches[i], batches[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(apart) >= 0.95 * radius
    # The first knows of no other. The order in which the earlier ones are given is rounding; leaving one out
    # is another image.
    swapped = host.sample(after(host, batches[1], batches[0], radius=radius), text)
    torch.testing.assert_close(swapped, batches[2], atol=1e-3, rtol=1e-3)
    alone = host.sample(after(host, batches[1], radius=radius), text)
    assert (
        between(host, alone, batches[2]) > 0.05 * radius and between(host, alone, batches[1]) >= 0.95 * radius
    )


def test_earlier_latents_beside_a_set(host: Any, copies: NegationSet) -> None:
    """One image as a reference and as an earlier latent has the effect of two references."""
    text = host.text(STAR)
    other = host.sample(host.model, text, seed=2)
    both = repel(host, copies, radius=0.5, overcompensation=1.0, earlier={"samples": other})
    samples = host.sample(both, text)
    assert not torch.equal(samples, host.sample(repel(host, copies, radius=0.5, overcompensation=1.0), text))
    assert not torch.equal(samples, host.sample(after(host, other, radius=0.5, cap=0.5), text))


@pytest.mark.parametrize(
    "settings", [{"radius": 0.0}, {"overcompensation": 0.0}, {"radius": 0.001}, {"end_sigma": 500.0}]
)
def test_earlier_latents_that_are_off_or_far_change_no_bit(host: Any, settings: dict[str, Any]) -> None:
    text = host.text(STAR, HEART)
    other = host.sample(host.model, text, seed=5)
    counted, rows = host.count_calls(after(host, other, **settings))
    plain, plain_rows = host.count_calls(host.model)
    assert torch.equal(host.sample(counted, text), host.sample(plain, text)) and rows == plain_rows


def test_earlier_latents_of_all_kinds(host: Any) -> None:
    text = host.text(STAR)
    plain = host.sample(host.model, text)
    empty = host.empty_latent(2)["samples"]
    assert torch.equal(host.sample(after(host, empty, radius=5.0), text), plain), (
        "an empty latent shows no image"
    )
    wide = torch.nn.functional.interpolate(plain, size=(32, 48))
    assert not torch.equal(host.sample(after(host, wide, radius=1.0), text), plain)
    # Normalised as the published baseline has them: other references.
    kinds = [
        host.sample(after(host, plain, radius=1.0, references=kind), text)
        for kind in ("as they are", "normalised per pixel")
    ]
    assert not torch.equal(*kinds)
    for bad, sentence in (
        (torch.zeros(1, 16, 8, 8), "model samples images with 4 channels"),
        (torch.full((1, 4, 8, 8), torch.nan), "not numbers"),
    ):
        with pytest.raises(ValueError, match=sentence):
            host.sample(after(host, bad), text)


def test_normalised_references_are_other_references(host: Any, copies: NegationSet) -> None:
    text = host.text(STAR)
    as_they_are, normalised = (
        host.sample(repel(host, copies, radius=1.5, references=kind), text)
        for kind in ("as they are", "normalised per pixel")
    )
    assert not torch.equal(as_they_are, normalised)


def test_a_set_needs_a_vae(host: Any, copies: NegationSet) -> None:
    from safe_guidance.nodes.spell import SparseRepellencyNode

    with pytest.raises(ValueError, match="Connect the model's VAE"):
        SparseRepellencyNode.execute(model=host.model, negation_set=copies)
