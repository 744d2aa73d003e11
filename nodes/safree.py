"""SAFREE: remove unwanted concepts from the embedding of a prompt."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..guidance.safree import ARTIST_VALIDATION, NUDITY_CONCEPTS, SelfValidation
from ..reports.safree_report import safree_report
from .host.engine.hooks import attach
from .host.engine.node_messages import message_ui
from .host.methods.safree import filter_text, has_several_encoders
from .host.methods.safree_reattention import ReattentionCorrection
from .model_inputs import clip_input
from .parsing import phrases_of

CATEGORY = "safe guidance/text"
AS_PUBLISHED = "as published"
VALIDATIONS: dict[str, SelfValidation | None] = {
    "self-validating": SelfValidation(),
    "self-validating, artist": ARTIST_VALIDATION,
    "all": None,
}
"""Self-validating filters by the choice of steps; None filters all steps."""


def validation_for(steps: str, clip: Any) -> SelfValidation | None:
    """Return the self-validating filter that a choice of `steps` means, or None to filter all steps.

    "as published" filters all steps of models with several text encoders.
    """
    if steps == AS_PUBLISHED:
        return None if has_several_encoders(clip) else SelfValidation()
    return VALIDATIONS[steps]


class SafreeTextFilterNode(io.ComfyNode):
    """Encodes a prompt in place of CLIP Text Encode and filters it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafreeTextFilter",
            display_name="SAFREE Text Filter",
            category=CATEGORY,
            description="CLIP Text Encode that removes unwanted concepts from the prompt's "
            "embedding. It costs nothing during sampling. A prompt without such words "
            "is encoded exactly as by CLIP Text Encode.",
            search_aliases=[
                "safree",
                "prompt filter",
                "clip text encode",
                "nsfw",
                "concept erasing",
                "toxic",
            ],
            inputs=[
                clip_input("the prompt and the concepts"),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, as in CLIP Text Encode.",
                ),
                io.String.Input(
                    "concepts",
                    default="\n".join(NUDITY_CONCEPTS),
                    multiline=True,
                    tooltip="Unwanted concepts, one phrase per line or separated by commas. More "
                    "phrases catch more words, including harmless ones. The default is the "
                    "paper's list for nudity; for a style, write the artist's name.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.01,
                    min=-1.0,
                    max=10.0,
                    step=0.005,
                    round=0.0001,
                    tooltip="How clearly a word must belong to the concepts to be filtered. A higher "
                    "value filters fewer words. Start with 0.01.",
                ),
                io.Combo.Input(
                    "steps",
                    options=[AS_PUBLISHED, *VALIDATIONS],
                    default=AS_PUBLISHED,
                    tooltip="For how many steps the filtered prompt is used before the original prompt takes "
                    "over. self-validating: the more the filter changes the prompt, the longer, up to"
                    " a fifth of the run. self-validating, artist: the same with the paper's values "
                    "for an artist's name. all: every step, the strongest. as published (start here):"
                    " self-validating for models with one text encoder, all for models with several.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The filtered prompt, for the sampler."
                ),
                io.Conditioning.Output(
                    display_name="unfiltered", tooltip="The prompt as encoded by CLIP Text Encode."
                ),
                io.String.Output(
                    display_name="negative_text",
                    tooltip="The concepts as one text. The paper also uses it as the negative prompt: "
                    "connect it to CLIP Text Encode.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Each word with its score, and which words were filtered."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, concepts: str, alpha: float, steps: str) -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "There is no CLIP. Connect one that belongs to the model; "
                "a checkpoint without one needs a CLIP loader."
            )
        unwanted = phrases_of(concepts)
        if not unwanted:
            raise ValueError("SAFREE has no concept. Write at least one phrase of what is unwanted.")
        found = filter_text(clip, text, unwanted, alpha, validation_for(steps, clip))
        report = safree_report(found.verdicts, found.change, found.last_step, found.limited)
        negative = ", ".join(unwanted)
        return io.NodeOutput(found.conditioning, found.plain, negative, report, ui=message_ui(report))


class SafreeReattentionNode(io.ComfyNode):
    """Attaches latent re-attention to a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafreeReattention",
            display_name="SAFREE Latent Re-attention",
            category=CATEGORY,
            description="The second half of SAFREE: attenuates features that are stronger for the "
            "filtered prompt than for the original one. The published results do not "
            "use it. Costs one extra model evaluation per step while the filtered "
            "prompt is used.",
            search_aliases=["safree", "latent re-attention", "freeu", "skip connections", "frequency"],
            is_experimental=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="Model to patch. It must be a UNet: Stable Diffusion 1.x, 2.x or SDXL."
                ),
                io.Conditioning.Input(
                    "unfiltered", tooltip="The original prompt: connect unfiltered of SAFREE Text Filter."
                ),
                io.Float.Input(
                    "deep",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Factor (s1) for features in the deepest level of the decoder; 1 is off. A "
                    "lower value attenuates more. Start with 0.9.",
                ),
                io.Float.Input(
                    "shallow",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Factor (s2) for features in the second deepest level of the decoder; 1 is "
                    "off. A lower value attenuates more. Start with 0.2.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, unfiltered: list[Any], deep: float, shallow: float
    ) -> io.NodeOutput:
        return io.NodeOutput(attach(model, ReattentionCorrection(unfiltered, deep, shallow)))


NODES: list[type[io.ComfyNode]] = [SafreeTextFilterNode, SafreeReattentionNode]
