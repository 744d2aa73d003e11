"""Inputs, limits and search words that the Detect-and-Guide (DAG) nodes share."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "safe guidance/detect and guide"
ALIASES = [
    "dag",
    "detect and guide",
    "guideline",
    "concept detector",
    "attention map",
    "nsfw",
    "concept erasing",
]
MOST_IMAGES = 512
"""Images that guideline tokens may be learnt from."""
SCALES = {"1/2": (2,), "1/2 and 1/4": (2, 4), "1/4": (4,), "1 and 1/2": (1, 2)}
"""Sizes of attention maps by the name a person chooses, as divisors of the latent's size."""


def check_count(count: int, what: str) -> None:
    """Check the number of images or prompts that tokens are learnt from.

    Raises:
        ValueError: there are more than MOST_IMAGES.
    """
    if count > MOST_IMAGES:
        raise ValueError(f"There are {count} {what}. Use at most {MOST_IMAGES}: a few dozen are enough.")


def attention_inputs() -> list[io.Input]:
    """Return the inputs for the noise levels and layers at which attention is recorded."""
    return [
        io.String.Input(
            "sigmas",
            default="7, 5, 3, 2, 1",
            optional=True,
            advanced=True,
            tooltip="Noise levels (sigma) at which attention is recorded. Use the levels at "
            "which the method will act; more levels take more time and memory.",
        ),
        io.Combo.Input(
            "scales",
            options=list(SCALES),
            default="1/2 and 1/4",
            optional=True,
            advanced=True,
            tooltip="Sizes of the attention maps to record, relative to the latent. Start with "
            "1/2 and 1/4, the paper's; use 1/2 alone for small latents.",
        ),
    ]
