"""Negation sets: the images that say what a model should stay away from."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from comfy_api.latest import io

from ..formats import negation_set as files
from .host.engine.node_messages import message_ui
from .host.files.folders import (
    input_folder,
    input_folders,
    negation_set_names,
    negation_set_path,
    save_negation_set,
)
from .host.files.image_folders import read_folder, state_of
from .io_types import NegationSetType

CATEGORY = "safe guidance/negation sets"
ALIASES = ["negative image", "avoid style", "unwanted images", "nsfw", "reference set", "concept erasing"]


class LoadNegationSet(io.ComfyNode):
    """A set from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceLoadNegationSet",
            display_name="Load Negation Set",
            category=CATEGORY,
            description="Loads images to stay away from: one of the bundled sets, or a file in models/negation_sets.",
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
    """A set from images in the workflow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceBuildNegationSet",
            display_name="Build Negation Set",
            category=CATEGORY,
            description="Makes a set from images in the workflow: generated ones, or photographs of what you do not want.",
            search_aliases=ALIASES,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The images to stay away from. More and more varied ones describe it better; 1 is enough to try, and with a "
                    "mask about a hundred are needed.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the unwanted thing is, in one mask for all or one per image. It is then looked for anywhere; "
                    "without a mask whole layouts are compared. An empty mask (black) says that an image is fine.",
                ),
                io.String.Input(
                    "name",
                    default="my set",
                    tooltip="A name for people; it does not change what the set does.",
                ),
                *origin_inputs(),
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


class NegationSetFromFolder(io.ComfyNode):
    """A set from the files of a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceNegationSetFromFolder",
            display_name="Negation Set from Folder",
            category=CATEGORY,
            description="Makes a set from all images in a folder under the host's input folder: PNG, JPEG, WebP, BMP, and the first "
            "frame of GIFs. Files that cannot be used are listed with the reason.",
            search_aliases=[*ALIASES, "load folder", "directory", "batch"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=input_folders(),
                    tooltip="A folder under the host's input folder; the dot is that folder itself. Put your images there.",
                ),
                io.Boolean.Input(
                    "sub_folders", default=True, tooltip="Also take the images in the folders inside it."
                ),
                io.Int.Input(
                    "longest_side",
                    default=1024,
                    min=64,
                    max=files.MAX_SIDE,
                    tooltip="Larger images are reduced to this many pixels. The size you generate is enough; less takes less memory.",
                ),
                io.Boolean.Input(
                    "drop_duplicates",
                    default=True,
                    tooltip="Keep every image once. Exact copies only give one more weight.",
                ),
                io.String.Input(
                    "name", default="", optional=True, tooltip="A name for people; without one, the folder's."
                ),
                *origin_inputs(),
            ],
            outputs=[
                NegationSetType.Output(display_name="negation_set"),
                io.String.Output(
                    display_name="report",
                    tooltip="How many images there are, and every file that was skipped, with the reason.",
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
        lines = [
            f"{len(kept)} images, {len(found) - len(kept)} duplicates dropped, {len(skipped)} files skipped"
        ]
        report = "\n".join([*lines, *(f"{s.path}: {s.reason}" for s in skipped)])
        return io.NodeOutput(kept, report, ui=message_ui(report))


class CombineNegationSets(io.ComfyNode):
    """One set out of several."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceCombineNegationSets",
            display_name="Combine Negation Sets",
            category=CATEGORY,
            description="Puts the images of several sets into one, which is then compared and calibrated as a whole. To give every set a "
            "strength of its own, use one Safe Denoiser after another instead.",
            search_aliases=[*ALIASES, "merge", "join", "concatenate"],
            inputs=[
                NegationSetType.Input("first", tooltip="A set."),
                NegationSetType.Input(
                    "second",
                    tooltip="Another one. Combine images of a style with images that are fine, which have empty masks; otherwise sets "
                    "with masks only with sets with masks.",
                ),
                NegationSetType.Input("third", optional=True, tooltip="One more."),
                NegationSetType.Input("fourth", optional=True, tooltip="One more."),
                io.Boolean.Input(
                    "drop_duplicates",
                    default=True,
                    tooltip="Keep every image once. Exact copies only give one more weight.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="A name for people; without one, those of the sets.",
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


class SaveNegationSet(io.ComfyNode):
    """A set's file, for later and for others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSaveNegationSet",
            display_name="Save Negation Set",
            category=CATEGORY,
            description="Writes a set into models/negation_sets, where Load Negation Set finds it. The file holds the images themselves "
            "with source and licence, and serves every model and size.",
            search_aliases=[*ALIASES, "export", "share"],
            is_output_node=True,
            inputs=[
                NegationSetType.Input("negation_set", tooltip="The set to save."),
                io.String.Input(
                    "file_name",
                    default="my_set",
                    tooltip="Name of the file, with / for sub-folders of models/negation_sets.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace a file of that name. Otherwise the new one gets a number, unless it is the same set.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file", tooltip="The name under which Load Negation Set offers it."
                )
            ],
        )

    @classmethod
    def execute(cls, negation_set: files.NegationSet, file_name: str, overwrite: bool) -> io.NodeOutput:
        path = save_negation_set(negation_set, file_name, overwrite)
        return io.NodeOutput(path, ui=message_ui(f"{len(negation_set)} images in models/negation_sets/{path}"))


def origin_inputs() -> list[io.Input]:
    """Where images come from, for whoever gets the set."""
    return [
        io.String.Input(
            "source", default="", optional=True, advanced=True, tooltip="Where the images come from."
        ),
        io.String.Input(
            "licence",
            default="",
            optional=True,
            advanced=True,
            tooltip="Under which terms the images may be used.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [
    LoadNegationSet,
    BuildNegationSet,
    NegationSetFromFolder,
    CombineNegationSets,
    SaveNegationSet,
]
