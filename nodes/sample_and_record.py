"""Images that the model makes, with what its attention asked: what the paper learns guideline tokens from."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from .host.attention.capture import attention_width
from .host.attention.recording import SamplerSettings, sample_and_look
from .host.engine.conditioning import encode
from .host.engine.node_messages import message_ui
from .io_types import RecordedAttentionType
from .shared_inputs import (
    DAG_ALIASES,
    DAG_CATEGORY,
    LARGEST_SEED,
    MOST_IMAGES,
    SCALES,
    attention_inputs,
    entries_of,
    lines_of,
    noise_levels,
    sampler_inputs,
    seed_input,
)


class SampleAndRecordAttention(io.ComfyNode):
    """One image for each prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSampleAndRecordAttention",
            display_name="Sample and Record Attention",
            category=DAG_CATEGORY,
            description="Makes an image for each prompt, exactly as KSampler does, and keeps what the model's attention asked along the "
            "way. Mask the concept in the images; guideline tokens are then learnt from the model's own runs, as in the paper.",
            search_aliases=[
                *DAG_ALIASES,
                "guideline tokens",
                "annotate",
                "training images",
                "prompts",
                "batch of prompts",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model whose attention is to find the concept."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Conditioning.Input(
                    "negative", tooltip="What the images should not show, as for KSampler."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the images' size; every image starts from its first row.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="What the images with the concept show, a line for each. More and more varied ones teach better, and take "
                    "longer.",
                ),
                io.String.Input(
                    "safe_prompts",
                    default="",
                    multiline=True,
                    tooltip="What the images without the concept show, a line for each: other things, much like the first. Without them, "
                    "tokens find things rather than the concept.",
                ),
                *sampler_inputs(
                    seed_input(
                        "Seed of the first image; each of the following takes the next number.", LARGEST_SEED
                    )
                ),
                io.String.Input(
                    "seeds",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A seed for each image, with commas between, those with the concept first. Images without one count on "
                    "from the last; empty, all from seed.",
                ),
                *attention_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="The images with the concept: mask it in them."
                ),
                io.Image.Output(display_name="safe_images", tooltip="The images without the concept."),
                RecordedAttentionType.Output(
                    display_name="attention", tooltip="Of all these images, for Optimize Guideline Tokens."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: object,
        vae: Any,
        negative: list[Any],
        latent_image: dict[str, Any],
        prompts: str,
        safe_prompts: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        seeds: str = "",
        sigmas: str = "7, 5, 3, 2, 1",
        scales: str = "1/2 and 1/4",
    ) -> io.NodeOutput:
        shown = lines_of(prompts)
        if not shown:
            raise ValueError(
                "There is no prompt that shows the concept. Write at least one line into prompts."
            )
        texts = [*shown, *lines_of(safe_prompts)]
        if len(texts) > MOST_IMAGES:
            raise ValueError(
                f"There are {len(texts)} prompts. Use at most {MOST_IMAGES}: a few dozen are enough."
            )
        attention_width(model)
        latents, attention = sample_and_look(
            model,
            [encode(clip, text) for text in texts],
            negative,
            seeds_of(seeds, seed, len(texts)),
            latent_image,
            SamplerSettings(steps, cfg, sampler_name, scheduler),
            noise_levels(sigmas),
            SCALES[scales],
        )
        images = torch.cat([vae.decode(latent[None]) for latent in latents])
        told = f"{len(texts)} images, attention kept at sigma {', '.join(f'{sigma:.2g}' for sigma in attention.sigmas)}"
        return io.NodeOutput(images[: len(shown)], images[len(shown) :], attention, ui=message_ui(told))


def seeds_of(text: str, first: int, count: int) -> list[int]:
    """Seeds of `count` images from a list with commas that may be too short.

    Raises:
        ValueError: something in the list is no whole number from 0 on.
    """
    given = entries_of(text)[:count]
    if not all(entry.isdecimal() and int(entry) <= LARGEST_SEED for entry in given):
        raise ValueError(
            f"'{text}' is not a list of seeds. Write whole numbers with commas between them, such as 3, 14, 15."
        )
    seeds = [int(entry) for entry in given] or [first]
    return [*seeds, *((seeds[-1] + i) % (LARGEST_SEED + 1) for i in range(1, count - len(seeds) + 1))]


NODES: list[type[io.ComfyNode]] = [SampleAndRecordAttention]
