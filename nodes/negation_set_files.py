"""Nodes that load and save negation sets: the reference images to keep away from."""

from __future__ import annotations

from comfy_api.latest import io

from ..formats import negation_set as files
from ..formats.tensor_file import content_hash
from .host.engine.node_messages import message_ui
from .host.files.folders import negation_set_names, negation_set_path
from .host.files.saving import save_negation_set
from .io_types import NegationSetType
from .negation_set_inputs import ALIASES, CATEGORY


class LoadNegationSetNode(io.ComfyNode):
    """Loads a set from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceLoadNegationSet",
            display_name="Load Negation Set",
            category=CATEGORY,
            description="Loads a negation set, the reference images to keep away from: a bundled "
            "set, or a file in models/negation_sets.",
            search_aliases=ALIASES,
            inputs=[
                io.Combo.Input(
                    "name",
                    options=negation_set_names(),
                    tooltip="Negation set file. Bundled sets come with the pack; put your own into "
                    "models/negation_sets.",
                )
            ],
            outputs=[NegationSetType.Output(display_name="negation_set")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        path = negation_set_path(name)
        return content_hash(path)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(files.load(negation_set_path(name)))


class SaveNegationSetNode(io.ComfyNode):
    """Saves a set to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSaveNegationSet",
            display_name="Save Negation Set",
            category=CATEGORY,
            description="Saves a negation set to models/negation_sets, where Load Negation Set "
            "lists it. The file holds the images with source and licence, and works for "
            "every model and size.",
            search_aliases=[*ALIASES, "export", "share"],
            is_output_node=True,
            inputs=[
                NegationSetType.Input("negation_set", tooltip="Negation set to save to a file."),
                io.String.Input(
                    "file_name",
                    default="my_set",
                    tooltip="Name of the file. Use / for sub-folders of models/negation_sets.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace an existing file of that name. When off, a number is appended "
                    "unless it is the same set.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file", tooltip="Name under which Load Negation Set lists the file."
                )
            ],
        )

    @classmethod
    def execute(cls, negation_set: files.NegationSet, file_name: str, overwrite: bool) -> io.NodeOutput:
        path = save_negation_set(negation_set, file_name, overwrite)
        return io.NodeOutput(
            path, ui=message_ui(f"{len(negation_set)} images in models/negation_sets/{path}")
        )


NODES: list[type[io.ComfyNode]] = [LoadNegationSetNode, SaveNegationSetNode]
