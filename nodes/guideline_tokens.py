"""Nodes that load, save and learn guideline tokens, which tell the DAG detector what to find."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..formats import guideline_token_file
from ..guidance.detect_and_guide.annotated_images import annotate
from ..guidance.detect_and_guide.attention_cache import AttentionCache
from ..guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..guidance.detect_and_guide.token_optimization import OptimizationSettings
from ..reports.curves import curve
from .dag_inputs import ALIASES, CATEGORY, MOST_IMAGES, SCALES, attention_inputs
from .host.attention.given_images import record_images
from .host.attention.token_learning import learn
from .host.attention.tokens_from_text import tokens_from_text
from .host.engine.node_messages import message_ui
from .host.files.folders import GUIDELINE_TOKENS, file_names, file_path, save_guideline_tokens
from .io_types import GuidelineTokensType, RecordedAttentionType
from .parsing import captions_of, noise_levels
from .shared_inputs import origin_inputs, seed_input


class LoadGuidelineTokens(io.ComfyNode):
    """Loads guideline tokens from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceLoadGuidelineTokens",
            display_name="Load Guideline Tokens",
            category=CATEGORY,
            description="Loads guideline tokens, which tell the DAG detector what to find: bundled "
            "ones, or a file in models/guideline_tokens.",
            search_aliases=ALIASES,
            inputs=[
                io.Combo.Input(
                    "name",
                    options=file_names(GUIDELINE_TOKENS),
                    tooltip="File with guideline tokens. The bundled ones are for the demo model; put "
                    "your own into models/guideline_tokens.",
                )
            ],
            outputs=[GuidelineTokensType.Output(display_name="guideline_tokens")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        return hashlib.sha256(file_path(GUIDELINE_TOKENS, name).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(guideline_token_file.load(file_path(GUIDELINE_TOKENS, name)))


class SaveGuidelineTokens(io.ComfyNode):
    """Saves guideline tokens to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSaveGuidelineTokens",
            display_name="Save Guideline Tokens",
            category=CATEGORY,
            description="Saves guideline tokens to models/guideline_tokens, where Load Guideline "
            "Tokens lists them.",
            search_aliases=ALIASES,
            is_output_node=True,
            inputs=[
                GuidelineTokensType.Input("guideline_tokens", tooltip="Guideline tokens to save."),
                io.String.Input(
                    "name", default="my tokens", tooltip="Name of the file. Use / for a sub-folder."
                ),
                *origin_inputs("the training images", "the tokens"),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Replace an existing file of that name. When off, a number is appended to "
                    "the name.",
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
    """Makes guideline tokens with the text encoder alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceGuidelineTokensFromText",
            display_name="Guideline Tokens from Text",
            category=CATEGORY,
            description="Makes guideline tokens from words, without learning. Use them for a first "
            "look at what a model's attention knows; learnt tokens find more and make "
            "fewer mistakes.",
            search_aliases=ALIASES,
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder of the model. It encodes the words."),
                io.String.Input("words", default="nude person", tooltip="Concept to find, in few words."),
                io.Boolean.Input(
                    "whole_phrase",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Use every word piece as a token and average their maps. When off, only the "
                    "last token is used, which carries the meaning of the words before it. "
                    "Start with off.",
                ),
            ],
            outputs=[GuidelineTokensType.Output(display_name="guideline_tokens")],
        )

    @classmethod
    def execute(cls, clip: object, words: str, whole_phrase: bool = False) -> io.NodeOutput:
        return io.NodeOutput(tokens_from_text(clip, words, whole_phrase))


class OptimizeGuidelineTokens(io.ComfyNode):
    """Learns guideline tokens from a few images with masks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = OptimizationSettings()
        return io.Schema(
            node_id="SafeGuidanceOptimizeGuidelineTokens",
            display_name="Optimize Guideline Tokens",
            category=CATEGORY,
            description="Learns guideline tokens from a few images with masks of the concept and "
            "images without it. Only the tokens are trained; the model's attention is "
            "read once per image and noise level.",
            search_aliases=[*ALIASES, "train token", "textual inversion", "optimise guideline tokens"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model whose attention should find the concept. The tokens also fit models "
                    "fine-tuned from it.",
                ),
                io.Clip.Input(
                    "clip", tooltip="Text encoder of the model. It encodes the words and captions."
                ),
                io.Vae.Input("vae", tooltip="VAE of the model. It encodes the images into latents."),
                io.Image.Input(
                    "images",
                    tooltip="Images that show the concept, ideally generated by the model itself. More "
                    "and more varied images help. Start with a dozen.",
                ),
                io.Mask.Input("masks", tooltip="One mask per image, white on the concept."),
                io.Image.Input(
                    "safe_images",
                    optional=True,
                    tooltip="Images without the concept but with other subjects. Without them, the "
                    "tokens find any subject rather than the concept.",
                ),
                io.String.Input(
                    "words",
                    default="nude person",
                    tooltip="The concept in few words, from which learning starts.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One caption per line: first for the images with the concept, then for "
                    "those without. The prompts that made the images work best; missing lines "
                    "count as empty.",
                ),
                RecordedAttentionType.Input(
                    "attention",
                    optional=True,
                    tooltip="Attention recorded by Sample and Record Attention while the model made "
                    "these images. Captions, sigmas and scales then come from that node. "
                    "Without it, noise is added to the images and the model is run on them.",
                ),
                io.Int.Input(
                    "tokens",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Number of tokens for the concept; their maps are averaged. More tokens "
                    "separate better with many images and overfit with few. Start with 1.",
                ),
                io.Combo.Input(
                    "recipe",
                    options=["contrast", "paper"],
                    default="contrast",
                    tooltip="Training objective. contrast weighs small concepts as much as the rest and "
                    "ranks images with the concept above those without. paper is plain "
                    "cross-entropy with gradient descent, for concepts that fill much of the "
                    "image. Start with contrast.",
                ),
                seed_input("Seed of the noise and of the random draws. The same seed gives the same tokens."),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    advanced=True,
                    tooltip="Number of training steps; 0 means 100 for every image with the concept "
                    "(paper). More steps fit the images more closely and take longer.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Learning rate; 0 uses that of the recipe: 200 for paper, 0.1 for contrast. "
                    "A higher value learns faster and may overshoot.",
                ),
                *attention_inputs(),
                io.Int.Input(
                    "batch",
                    default=8,
                    min=1,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Images of each kind per training step. More are steadier and slower. Start "
                    "with 8; the paper uses 1.",
                ),
                io.Int.Input(
                    "levels",
                    default=defaults.levels,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Noise levels drawn per training step. More are steadier and slower. Start "
                    "with 5.",
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
        annotated = annotate(images, masks, safe_images)
        if len(annotated) > MOST_IMAGES:
            raise ValueError(
                f"There are {len(annotated)} images. Use at most {MOST_IMAGES}: a few dozen are enough."
            )
        if attention is None:
            lines = captions_of(captions, len(annotated))
            attention = record_images(
                model, clip, vae, annotated, lines, noise_levels(sigmas), SCALES[scales], seed
            )
        learnt = learn(model, clip, annotated, attention, words, tokens, settings)
        overlap = learnt.tokens.iou if learnt.tokens.iou is not None else 0.0
        return io.NodeOutput(
            learnt.tokens, curve(learnt.losses)[None], overlap, learnt.report, ui=message_ui(learnt.report)
        )


NODES: list[type[io.ComfyNode]] = [
    LoadGuidelineTokens,
    SaveGuidelineTokens,
    GuidelineTokensFromText,
    OptimizeGuidelineTokens,
]
