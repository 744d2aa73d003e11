"""Guideline tokens: what a detector looks for in the model's own attention."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..guidance.detect_and_guide import guideline_tokens as files
from ..guidance.detect_and_guide.attention_cache import AttentionCache
from ..guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..guidance.detect_and_guide.token_optimization import OptimizationSettings
from ..reports.curves import curve
from .host.attention.token_learning import Example, learn, look_at_images, tokens_from_text
from .host.engine.node_messages import message_ui
from .host.files.folders import GUIDELINE_TOKENS, file_names, file_path, save_guideline_tokens
from .io_types import GuidelineTokensType, RecordedAttentionType
from .shared_inputs import (
    DAG_ALIASES,
    DAG_CATEGORY,
    MOST_IMAGES,
    SCALES,
    attention_inputs,
    noise_levels,
    seed_input,
)


class LoadGuidelineTokens(io.ComfyNode):
    """Tokens from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceLoadGuidelineTokens",
            display_name="Load Guideline Tokens",
            category=DAG_CATEGORY,
            description="Loads what the DAG detector looks for: bundled tokens, or a file in models/guideline_tokens.",
            search_aliases=DAG_ALIASES,
            inputs=[
                io.Combo.Input(
                    "name",
                    options=file_names(GUIDELINE_TOKENS),
                    tooltip="Bundled tokens fit the demo model; your own files belong into models/guideline_tokens.",
                )
            ],
            outputs=[GuidelineTokensType.Output(display_name="guideline_tokens")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        return hashlib.sha256(file_path(GUIDELINE_TOKENS, name).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(files.load(file_path(GUIDELINE_TOKENS, name)))


class SaveGuidelineTokens(io.ComfyNode):
    """Tokens into a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSaveGuidelineTokens",
            display_name="Save Guideline Tokens",
            category=DAG_CATEGORY,
            description="Saves guideline tokens into models/guideline_tokens, where Load Guideline Tokens finds them.",
            search_aliases=DAG_ALIASES,
            is_output_node=True,
            inputs=[
                GuidelineTokensType.Input("guideline_tokens", tooltip="What to save."),
                io.String.Input(
                    "name", default="my tokens", tooltip="Name of the file; a / makes a sub-folder."
                ),
                io.String.Input(
                    "source",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Where the images they learnt from come from.",
                ),
                io.String.Input(
                    "licence",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Under which terms the tokens may be used.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Replace a file of that name; otherwise a number is put behind the name.",
                ),
            ],
            outputs=[io.String.Output(display_name="name")],
        )

    @classmethod
    def execute(
        cls,
        guideline_tokens: GuidelineTokens,
        name: str,
        source: str = "",
        licence: str = "",
        overwrite: bool = False,
    ) -> io.NodeOutput:
        texts = {
            "name": name,
            "source": source or guideline_tokens.source,
            "licence": licence or guideline_tokens.licence,
        }
        saved = save_guideline_tokens(replace(guideline_tokens, **texts), name, overwrite)
        return io.NodeOutput(saved, ui=message_ui(f"models/{GUIDELINE_TOKENS}/{saved}"))


class GuidelineTokensFromText(io.ComfyNode):
    """Tokens straight from a text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceGuidelineTokensFromText",
            display_name="Guideline Tokens from Text",
            category=DAG_CATEGORY,
            description="Makes guideline tokens from words alone, not optimised: good for a first look at what a model's attention knows. "
            "Optimised tokens find more and mistake less.",
            search_aliases=DAG_ALIASES,
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input("words", default="nude person", tooltip="What to look for, in few words."),
                io.Boolean.Input(
                    "whole_phrase",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Every word piece becomes a token, and their maps are averaged. Otherwise only the last one, which the words "
                    "before it colour.",
                ),
            ],
            outputs=[GuidelineTokensType.Output(display_name="guideline_tokens")],
        )

    @classmethod
    def execute(cls, clip: object, words: str, whole_phrase: bool = False) -> io.NodeOutput:
        return io.NodeOutput(tokens_from_text(clip, words, whole_phrase))


class OptimizeGuidelineTokens(io.ComfyNode):
    """Tokens learnt from a few images with masks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = OptimizationSettings()
        return io.Schema(
            node_id="SafeGuidanceOptimizeGuidelineTokens",
            display_name="Optimize Guideline Tokens",
            category=DAG_CATEGORY,
            description="Learns guideline tokens from a few images with masks of the concept and images without it. Only the tokens "
            "change; the model's attention is read once for every image and noise level.",
            search_aliases=[*DAG_ALIASES, "train token", "textual inversion", "optimise guideline tokens"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model whose attention is to find the concept, and models fine-tuned from it.",
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input(
                    "images",
                    tooltip="Images that show the concept, best made by the model itself. More and more varied ones help.",
                ),
                io.Mask.Input("masks", tooltip="One for each image, white where the concept is."),
                io.Image.Input(
                    "safe_images",
                    optional=True,
                    tooltip="Images without the concept but with other things. Without them, tokens find things rather than the concept.",
                ),
                io.String.Input(
                    "words",
                    default="nude person",
                    tooltip="The concept in few words: where the search begins.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the images show, a line for each: first the images with the concept, then those without. "
                    "Best the prompts that made them. Missing lines count as empty.",
                ),
                RecordedAttentionType.Input(
                    "attention",
                    optional=True,
                    tooltip="What the model's attention asked while it made these images, from Sample and Record Attention. Captions, "
                    "sigmas and scales are then those of that node. Without it, the images are shown to the model under noise.",
                ),
                io.Int.Input(
                    "tokens",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Tokens for the concept, whose maps are averaged. More tell apart more with many images, and learn the "
                    "images by heart with few.",
                ),
                io.Combo.Input(
                    "recipe",
                    options=["contrast", "paper"],
                    default="contrast",
                    tooltip="contrast: small concepts count as much as the rest, and images with it must reach higher than those "
                    "without. paper: plain cross-entropy and gradient descent, for concepts that fill much of the image.",
                ),
                seed_input("Of the noise and of what is drawn; the same gives the same tokens."),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    advanced=True,
                    tooltip="Steps of learning. 0 is 100 for every image with the concept (paper). More fits closer and takes longer.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="0 is the recipe's own: 200 for paper, 0.1 for contrast. More learns faster and may overshoot.",
                ),
                *attention_inputs(),
                io.Int.Input(
                    "batch",
                    default=8,
                    min=1,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Images of each kind in every iteration; the paper's is 1. More is steadier and slower.",
                ),
                io.Int.Input(
                    "levels",
                    default=defaults.levels,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Noise levels drawn for every iteration. More is steadier and slower.",
                ),
            ],
            outputs=[
                GuidelineTokensType.Output(display_name="guideline_tokens"),
                io.Image.Output(display_name="loss_curve"),
                io.Float.Output(display_name="iou"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: object,
        vae: object,
        images: torch.Tensor,
        masks: torch.Tensor,
        words: str,
        tokens: int,
        recipe: str,
        seed: int,
        safe_images: torch.Tensor | None = None,
        captions: str = "",
        attention: AttentionCache | None = None,
        iterations: int = 0,
        learning_rate: float = 0.0,
        sigmas: str = "7, 5, 3, 2, 1",
        scales: str = "1/2 and 1/4",
        batch: int = 8,
        levels: int = 5,
    ) -> io.NodeOutput:
        settings = OptimizationSettings(
            recipe, iterations or None, learning_rate or None, levels, batch, seed
        )  # type: ignore[arg-type]
        annotated = example(images, masks, safe_images)
        if attention is None:
            lines = captions_of(captions, len(annotated.images))
            attention = look_at_images(
                model, clip, vae, annotated, lines, noise_levels(sigmas), SCALES[scales], seed
            )
        learnt = learn(model, clip, annotated, attention, words, tokens, settings)
        overlap = learnt.tokens.iou if learnt.tokens.iou is not None else 0.0
        return io.NodeOutput(
            learnt.tokens, curve(learnt.losses)[None], overlap, learnt.report, ui=message_ui(learnt.report)
        )


def example(images: torch.Tensor, masks: torch.Tensor, safe_images: torch.Tensor | None) -> Example:
    """The images of both kinds as one batch.

    Raises:
        ValueError: masks or sizes do not fit the images.
    """
    if len(masks) not in (1, len(images)) or masks.ndim != 3:
        raise ValueError(
            f"There are {len(images)} images but {len(masks)} masks. Connect one mask for every image."
        )
    masks = masks.expand(len(images), -1, -1)
    if masks.shape[1:] != images.shape[1:3]:
        masks = torch.nn.functional.interpolate(masks[:, None].float(), size=images.shape[1:3], mode="area")[
            :, 0
        ]
    together = images[..., :3]
    if safe_images is not None:
        if safe_images.shape[1:3] != images.shape[1:3]:
            raise ValueError(
                "The images without the concept have another size than those with it. Scale them to the same size."
            )
        together = torch.cat([together, safe_images[..., :3]])
        masks = torch.cat([masks, masks.new_zeros(len(safe_images), *masks.shape[1:])])
    if len(together) > MOST_IMAGES:
        raise ValueError(
            f"There are {len(together)} images. Use at most {MOST_IMAGES}: a few dozen are enough."
        )
    return Example(together, masks)


def captions_of(text: str, count: int) -> tuple[str, ...]:
    """A line for each of `count` images, empty where there are too few."""
    lines = [line.strip() for line in text.strip("\n").split("\n")] if text.strip() else []
    return (*lines[:count], *[""] * (count - len(lines)))


NODES: list[type[io.ComfyNode]] = [
    LoadGuidelineTokens,
    SaveGuidelineTokens,
    GuidelineTokensFromText,
    OptimizeGuidelineTokens,
]
