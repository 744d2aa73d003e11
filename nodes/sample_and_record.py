"""Sample and Record Attention: images with the attention that made them, to learn guideline tokens from."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from .dag_inputs import ALIASES, CATEGORY, SCALES, attention_inputs, check_count
from .host.attention.capture import attention_width
from .host.attention.sampled_images import SamplerSettings, sample_and_record
from .host.engine.conditioning import encode
from .host.engine.node_messages import message_ui
from .io_types import RecordedAttentionType
from .model_inputs import clip_input
from .parsing import LARGEST_SEED, lines_of, noise_levels, seeds_of
from .shared_inputs import sampler_inputs, seed_input


class SampleAndRecordAttentionNode(io.ComfyNode):
    """Samples one image per prompt and records the attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSampleAndRecordAttention",
            display_name="Sample and Record Attention",
            category=CATEGORY,
            description="Generates one image per prompt, exactly as KSampler does, and records the "
            "model's attention. Mask the concept in the images, and Optimize Guideline "
            "Tokens learns from the model's own runs, as in the paper.",
            search_aliases=[
                *ALIASES,
                "guideline tokens",
                "annotate",
                "training images",
                "prompts",
                "batch of prompts",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Model whose attention should find the concept."),
                clip_input("the prompts"),
                io.Vae.Input("vae", tooltip="VAE of the model. It decodes the images."),
                io.Conditioning.Input("negative", tooltip="Negative prompt of all images, as in KSampler."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Empty latent of the image size. Every image starts from its first entry.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts for images with the concept, one per line. More and more varied "
                    "prompts teach better and take longer.",
                ),
                io.String.Input(
                    "safe_prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts for similar images without the concept, one per line. Without "
                    "them, the tokens find any subject rather than the concept.",
                ),
                *sampler_inputs(
                    seed_input(
                        "Seed of the first image. Each following image uses the next number.", LARGEST_SEED
                    )
                ),
                io.String.Input(
                    "seeds",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="One seed per image, separated by commas; images with the concept come first. If "
                    "there are too few, further images continue counting from the last one. When "
                    "empty, counting starts at the input seed.",
                ),
                *attention_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="Images with the concept. Mask the concept in them."
                ),
                io.Image.Output(
                    display_name="safe_images",
                    tooltip="Images without the concept, for Optimize Guideline Tokens.",
                ),
                RecordedAttentionType.Output(
                    display_name="attention",
                    tooltip="Recorded attention of all these images, for Optimize Guideline Tokens.",
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
        check_count(len(texts), "prompts")
        attention_width(model)
        latents, attention = sample_and_record(
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
        levels = ", ".join(f"{sigma:.2g}" for sigma in attention.sigmas)
        told = f"{len(texts)} images, attention recorded at sigma {levels}"
        return io.NodeOutput(images[: len(shown)], images[len(shown) :], attention, ui=message_ui(told))


NODES: list[type[io.ComfyNode]] = [SampleAndRecordAttentionNode]
