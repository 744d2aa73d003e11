"""Nodes that load, save and make guideline tokens, which tell the DAG detector what to find."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..formats import guideline_token_file
from ..formats.tensor_file import content_hash
from ..guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from .dag_inputs import ALIASES, CATEGORY
from .host.attention.tokens_from_text import tokens_from_text
from .host.engine.node_messages import message_ui
from .host.files.folders import GUIDELINE_TOKENS, file_names, file_path
from .host.files.saving import save_guideline_tokens
from .io_types import GuidelineTokensType
from .model_inputs import clip_input
from .shared_inputs import origin_inputs


class LoadGuidelineTokensNode(io.ComfyNode):
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
        return content_hash(file_path(GUIDELINE_TOKENS, name))

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(guideline_token_file.load(file_path(GUIDELINE_TOKENS, name)))


class SaveGuidelineTokensNode(io.ComfyNode):
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


class GuidelineTokensFromTextNode(io.ComfyNode):
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
                clip_input("the words"),
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


NODES: list[type[io.ComfyNode]] = [
    LoadGuidelineTokensNode,
    SaveGuidelineTokensNode,
    GuidelineTokensFromTextNode,
]
