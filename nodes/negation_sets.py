"""Negation sets: the pictures that say what a model should stay away from."""

from __future__ import annotations

import hashlib

import torch
from comfy_api.latest import io, ui

from ..guidance import negation_set as files
from ..guidance.contact_sheet import contact_sheet
from .host.folders import negation_set_names, negation_set_path
from .types import NegationSetType

CATEGORY = "safe guidance/negation sets"
ALIASES = ["negative image", "avoid style", "unwanted pictures", "nsfw", "reference set", "concept erasing"]


class LoadNegationSet(io.ComfyNode):
    """A set from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceLoadNegationSet",
            display_name="Load Negation Set",
            category=CATEGORY,
            description="Loads pictures to stay away from: one of the bundled sets, or a file in models/negation_sets.",
            search_aliases=ALIASES,
            inputs=[
                io.Combo.Input(
                    "name",
                    options=negation_set_names(),
                    tooltip="Bundled sets come with the pack; your own files belong into models/negation_sets.",
                )
            ],
            outputs=[NegationSetType.Output(display_name="negation_set")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        path = negation_set_path(name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(files.load(negation_set_path(name)))


class BuildNegationSet(io.ComfyNode):
    """A set from pictures in the workflow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceBuildNegationSet",
            display_name="Build Negation Set",
            category=CATEGORY,
            description="Makes a set from pictures in the workflow: generated ones, or photographs of what you do not want.",
            search_aliases=ALIASES,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures to stay away from. More and more varied ones describe it better; 1 is enough to try.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the unwanted thing is, in one mask for all or one per picture. It is then looked for anywhere; "
                    "without a mask whole layouts are compared.",
                ),
                io.String.Input("name", default="my set", tooltip="A name for people; it does not change what the set does."),
                io.String.Input("source", default="", optional=True, advanced=True, tooltip="Where the pictures come from."),
                io.String.Input("licence", default="", optional=True, advanced=True, tooltip="Under which terms the pictures may be used."),
            ],
            outputs=[NegationSetType.Output(display_name="negation_set")],
        )

    @classmethod
    def execute(
        cls, images: torch.Tensor, name: str, mask: torch.Tensor | None = None, source: str = "", licence: str = ""
    ) -> io.NodeOutput:
        return io.NodeOutput(files.from_images(images, mask, name, source, licence))


class PreviewNegationSet(io.ComfyNode):
    """What is in a set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidancePreviewNegationSet",
            display_name="Preview Negation Set",
            category=CATEGORY,
            description="Shows the pictures of a set on a contact sheet, with their number, sizes, source and licence.",
            search_aliases=ALIASES,
            is_output_node=True,
            inputs=[
                NegationSetType.Input("negation_set", tooltip="The set to look at."),
                io.Int.Input(
                    "most",
                    default=64,
                    min=1,
                    max=1024,
                    tooltip="How many pictures the sheet shows at the most, spread evenly over the set. More makes a larger sheet.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet"), io.String.Output(display_name="summary")],
        )

    @classmethod
    def execute(cls, negation_set: files.NegationSet, most: int) -> io.NodeOutput:
        sheet = contact_sheet(negation_set, most)[None]
        summary = summarize(negation_set)
        return io.NodeOutput(sheet, summary, ui={**ui.PreviewImage(sheet, cls=cls).as_dict(), **ui.PreviewText(summary).as_dict()})


def summarize(negation_set: files.NegationSet) -> str:
    """A few lines about a set for people."""
    sizes = negation_set.sizes()
    shown = ", ".join(f"{width} x {height}" for width, height in sizes[:4]) + (" and others" if len(sizes) > 4 else "")
    unique = len(files.without_duplicates(negation_set))
    lines = [
        f"{negation_set.name or 'unnamed'}: {len(negation_set)} pictures ({unique} different), {shown} pixels",
        f"masks: {sum(mask is not None for mask in negation_set.masks)}",
        f"source: {negation_set.source or 'not stated'}",
        f"licence: {negation_set.licence or 'not stated'}",
        f"hash: {negation_set.content_hash[:16]}",
    ]
    return "\n".join(lines)


NODES: list[type[io.ComfyNode]] = [LoadNegationSet, BuildNegationSet, PreviewNegationSet]
