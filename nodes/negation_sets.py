"""Nodes that build and combine negation sets: the reference images to keep away from."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..formats import negation_set as files
from ..reports.set_summary import folder_in_words
from .host.engine.node_messages import message_ui
from .host.files.folders import (
    input_folder,
    input_folders,
)
from .host.files.image_folders import read_folder, state_of
from .io_types import NegationSetType
from .negation_set_inputs import ALIASES, CATEGORY, drop_duplicates_input
from .shared_inputs import origin_inputs


class BuildNegationSetNode(io.ComfyNode):
    """Builds a set from images in the workflow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceBuildNegationSet",
            display_name="Build Negation Set",
            category=CATEGORY,
            description="Makes a negation set from images in the workflow: generated images, or "
            "photographs of what you do not want.",
            search_aliases=ALIASES,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="Reference images to keep away from. More and more varied images describe "
                    "the target better. One is enough to try; with masks use about a hundred.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Mask of the unwanted subject: one for all images or one per image. The "
                    "subject is then searched for at every position; without masks, whole "
                    "images are compared. An empty (black) mask marks a safe reference.",
                ),
                io.String.Input(
                    "name",
                    default="my set",
                    tooltip="Name of the set, shown in reports. It has no effect on images.",
                ),
                *origin_inputs("the images", "the images"),
            ],
            outputs=[NegationSetType.Output(display_name="negation_set")],
        )

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        name: str,
        mask: torch.Tensor | None = None,
        source: str = "",
        licence: str = "",
    ) -> io.NodeOutput:
        return io.NodeOutput(files.from_images(images, mask, name, source, licence))


class NegationSetFromFolderNode(io.ComfyNode):
    """Builds a set from the images of a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceNegationSetFromFolder",
            display_name="Negation Set from Folder",
            category=CATEGORY,
            description="Makes a negation set from all images in a folder under the input folder: "
            "PNG, JPEG, WebP, BMP and the first frame of GIFs. Files that cannot be "
            "used are listed with the reason.",
            search_aliases=[*ALIASES, "load folder", "directory", "batch"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=input_folders(),
                    tooltip="Folder with the images, under the input folder; the dot is the input "
                    "folder itself. Press R to refresh the list.",
                ),
                io.Boolean.Input(
                    "sub_folders",
                    default=True,
                    tooltip="Also use the images in sub-folders of the folder. Start with on.",
                ),
                io.Int.Input(
                    "longest_side",
                    default=1024,
                    min=64,
                    max=files.MAX_SIDE,
                    tooltip="Longest side in pixels; larger images are scaled down to it. A higher "
                    "value keeps more detail and takes more memory. Start with 1024; the size "
                    "you generate is enough.",
                ),
                drop_duplicates_input(),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="Name of the set, shown in reports. When empty, the folder's name is used.",
                ),
                *origin_inputs("the images", "the images"),
            ],
            outputs=[
                NegationSetType.Output(display_name="negation_set"),
                io.String.Output(
                    display_name="report",
                    tooltip="Number of images, and every skipped file with the reason.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, sub_folders: bool, **_: Any) -> str:
        return state_of(input_folder(folder), sub_folders)

    @classmethod
    def execute(
        cls,
        folder: str,
        sub_folders: bool,
        longest_side: int,
        drop_duplicates: bool,
        name: str = "",
        source: str = "",
        licence: str = "",
    ) -> io.NodeOutput:
        path = input_folder(folder)
        found, skipped = read_folder(path, sub_folders, longest_side, name or path.name, source, licence)
        kept = files.without_duplicates(found) if drop_duplicates else found
        report = folder_in_words(len(kept), len(found), skipped)
        return io.NodeOutput(kept, report, ui=message_ui(report))


class CombineNegationSetsNode(io.ComfyNode):
    """Merges several sets into one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceCombineNegationSets",
            display_name="Combine Negation Sets",
            category=CATEGORY,
            description="Merges the images of several negation sets into one, which is then "
            "compared and calibrated as a whole. For a separate strength per set, chain "
            "several Safe Denoiser nodes instead.",
            search_aliases=[*ALIASES, "merge", "join", "concatenate"],
            inputs=[
                NegationSetType.Input("first", tooltip="First negation set to combine."),
                NegationSetType.Input(
                    "second",
                    tooltip="Second negation set. To define a style, combine unmasked style images with "
                    "neutral images that have empty masks. Otherwise do not mix sets with masks and "
                    "sets without.",
                ),
                NegationSetType.Input("third", optional=True, tooltip="Third negation set, if needed."),
                NegationSetType.Input("fourth", optional=True, tooltip="Fourth negation set, if needed."),
                drop_duplicates_input(),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="Name of the set, shown in reports. When empty, the names of the sets are "
                    "joined.",
                ),
            ],
            outputs=[NegationSetType.Output(display_name="negation_set")],
        )

    @classmethod
    def execute(
        cls,
        first: files.NegationSet,
        second: files.NegationSet,
        drop_duplicates: bool,
        third: files.NegationSet | None = None,
        fourth: files.NegationSet | None = None,
        name: str = "",
    ) -> io.NodeOutput:
        whole = files.combined([s for s in (first, second, third, fourth) if s is not None], name)
        return io.NodeOutput(files.without_duplicates(whole) if drop_duplicates else whole)


NODES: list[type[io.ComfyNode]] = [BuildNegationSetNode, NegationSetFromFolderNode, CombineNegationSetsNode]
