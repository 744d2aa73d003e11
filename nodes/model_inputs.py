"""Inputs for the host's models, prompts and latents that several nodes share."""

from __future__ import annotations

from comfy_api.latest import io


def model_input() -> io.Input:
    """Return the input for the model that a method is attached to."""
    return io.Model.Input("model", tooltip="Model to protect. Connect it before any sampler.")


def clip_input(encoded: str) -> io.Input:
    """Return the input for the text encoder.

    Args:
        encoded: the texts that it encodes, such as "the prompts".
    """
    return io.Clip.Input("clip", tooltip=f"Text encoder of the model. It encodes {encoded}.")


def prompt_inputs() -> list[io.Input]:
    """Return the inputs for the prompts and the latent image, as KSampler has them."""
    return [
        io.Conditioning.Input("positive", tooltip="Positive prompt: what the image should show."),
        io.Conditioning.Input(
            "negative", tooltip="Negative prompt: what the image should not show, in words."
        ),
        io.Latent.Input(
            "latent_image", tooltip="Latent image to start from: an empty one, or an encoded image."
        ),
    ]
