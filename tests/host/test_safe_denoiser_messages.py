"""Messages of Safe Denoiser's node: settings that do not fit, and the images of a batch that changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safe_denoiser_values import WHOLE_IMAGES

from demo_prompts import HEART, STAR
from safe_guidance.formats.negation_set import NegationSet, from_images

pytestmark = pytest.mark.usefixtures("as_the_server_runs_prompts")


def run(host: Any, negation_set: NegationSet, *prompts: str, **settings: Any) -> None:
    """Sample two steps with settings for whole images unless told otherwise, attached by the node '5'."""
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.nodes.safe_denoiser import SafeDenoiserNode

    schema = SafeDenoiserNode.define_schema()
    defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    with CurrentNodeContext("prompt", "5"):
        output = SafeDenoiserNode.execute(
            host.model, host.vae, negation_set, **{**defaults, **WHOLE_IMAGES, **settings}
        )
    host.sample(output.args[0], host.text(*prompts), steps=2)


def masked(count: int, mask: float) -> NegationSet:
    images = torch.rand(count, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(count, 128, 128)
    masks[:, 40:90, 40:90] = mask
    return from_images(images, masks)


def test_whole_image_settings_with_a_masked_set_are_told_every_time(host: Any, shown: dict[str, str]) -> None:
    for _ in range(2):
        shown.clear()
        run(host, masked(3, 1.0), STAR)
        assert "These are settings for whole images: end_sigma 4.67 stops too early" in shown["5"]
        assert "has 3 masked images: with fewer than 60" in shown["5"]
        assert shown["5"].startswith("Safe Denoiser ")


def test_empty_masks_say_that_nothing_is_marked(host: Any, shown: dict[str, str]) -> None:
    with pytest.raises(
        ValueError, match="Nothing is marked as unwanted: .* Paint a mask .* or disconnect it"
    ):
        run(host, masked(2, 0.0), STAR)
    assert "Nothing is marked" in shown["5"]


def test_the_message_tells_which_images_of_a_batch_were_changed(host: Any, shown: dict[str, str]) -> None:
    image = host.vae.decode(host.sample(host.model, host.text(STAR)))
    copies = from_images(image.clone())
    run(host, copies, STAR, STAR, end_sigma=0.0, threshold=0.01, strength=1.0)
    assert "It changed all 2 images." in shown["5"]
    run(host, copies, HEART, STAR, end_sigma=0.0, threshold=1.5, strength=1.0)
    assert "changed image 2 of 2" in shown["5"] or "changed nothing" in shown["5"]


def styled_and_neutral(count: int) -> NegationSet:
    images = torch.rand(2 * count, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(2 * count, 128, 128)
    masks[:count] = 1
    return from_images(images, masks)


def test_automatic_settings_are_told_and_those_set_by_hand_are_not(host: Any, shown: dict[str, str]) -> None:
    automatic = dict.fromkeys(WHOLE_IMAGES, -1.0)
    run(host, masked(60, 1.0), STAR, **automatic)
    assert (
        "Automatic: a subject anywhere; strength 1.2, from the first step, to sigma 0.151, threshold 0.7, "
        "temperature 0.1, cap 2." in shown["5"]
    )
    assert "settings for whole images" not in shown["5"]
    run(host, styled_and_neutral(3), STAR, **{**automatic, "cap": 1.5})
    assert (
        "Automatic: a style; strength 1, from sigma 1.5, to sigma 0, threshold 0.2, temperature 0.1."
        in shown["5"]
    )
    run(host, from_images(torch.rand(2, 64, 64, 3)), STAR, **{**automatic, "window": "every step"})
    assert "Automatic: near-copies; strength 4, threshold 1, temperature 0.02, cap 2." in shown["5"]
    run(host, from_images(torch.rand(2, 64, 64, 3)), STAR)
    assert "Automatic" not in shown["5"]


def test_a_use_that_the_set_does_not_allow_is_refused(host: Any, shown: dict[str, str]) -> None:
    whole = from_images(torch.rand(2, 64, 64, 3))
    for use, lacks in (("a subject anywhere", "needs masks"), ("a style", "has 2 and 0")):
        with pytest.raises(ValueError, match=lacks):
            run(host, whole, STAR, use=use)
    with pytest.raises(ValueError, match="temperature of 0.001 .* Set at least 0.005, or -1"):
        run(host, whole, STAR, temperature=0.001)
