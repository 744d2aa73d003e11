"""Nodes that show, save and load safety traces: records of what every correction did at each step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ..formats.tensor_file import content_hash
from ..reports.trace import Trace
from ..reports.trace_file import METADATA, SUFFIXES, read_trace
from ..reports.trace_strip import strip
from ..reports.trace_text import in_words, table
from .host.engine.hooks import trace_of
from .host.engine.node_messages import message_ui
from .host.files.input_files import TRACES, bundled_or_input_names, bundled_or_input_path
from .host.files.saving import check_file_name, errors_of_saving
from .io_types import SafetyTraceType

CATEGORY = "safe guidance/evidence"


def theme_input() -> io.Input:
    """Return the choice of the drawing's background."""
    return io.Combo.Input(
        "theme", options=["dark", "light"], tooltip="Background colour of the drawing: dark or light."
    )


def strip_output() -> io.Output:
    """Return the output for the drawing of a trace."""
    return io.Image.Output(
        display_name="strip",
        tooltip="One lane per method and one bar per model call, with the noisiest step on the left.",
    )


def traced(model: ModelPatcher | None, latent: dict[str, Any] | None, trace: Trace | None) -> Trace:
    """Return the given trace, or that of the run in which `model` sampled `latent`.

    Raises:
        ValueError: neither is given, or the model has no trace of this latent.
    """
    if trace is not None:
        return trace
    if model is None or latent is None:
        raise ValueError(
            "There is no trace to show. Connect a trace, or the guarded MODEL and the LATENT that a sampler "
            "made with it."
        )
    found = trace_of(model, latent["samples"])
    if found is None:
        raise ValueError(
            "This MODEL did not sample this LATENT, or its trace was evicted (the last 32 runs are kept). "
            "Connect the LATENT of the sampler that used this MODEL, and queue again with another seed."
        )
    return found


class SafetyTraceNode(io.ComfyNode):
    """Shows the trace of a guarded MODEL and the LATENT sampled with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafetyTrace",
            display_name="Safety Trace",
            category=CATEGORY,
            description="Shows what the methods did during sampling: when, how strongly and at what "
            "cost. Connect the MODEL that goes into the sampler and the LATENT that "
            "comes out of it.",
            search_aliases=["trace", "report", "did it do anything", "evidence", "log", "audit"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="The guarded model that goes into the sampler."
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The latent that the sampler made with this model."
                ),
                SafetyTraceType.Input(
                    "trace", optional=True, tooltip="A trace to show, instead of model and latent."
                ),
                theme_input(),
            ],
            outputs=[
                strip_output(),
                io.String.Output(display_name="table", tooltip="Every record of the trace as text."),
                io.String.Output(
                    display_name="json",
                    tooltip="The whole trace as JSON. Save it as a file to load it again.",
                ),
                SafetyTraceType.Output(display_name="trace"),
            ],
        )

    @classmethod
    def execute(
        cls,
        theme: Literal["dark", "light"],
        model: ModelPatcher | None = None,
        latent: dict[str, Any] | None = None,
        trace: Trace | None = None,
    ) -> io.NodeOutput:
        found = traced(model, latent, trace)
        image, told = strip(found, theme), table(found)
        return io.NodeOutput(
            image, told, found.to_json(), found, ui=message_ui(in_words(found), ui.PreviewImage(image))
        )


class SaveImageWithTraceNode(io.ComfyNode):
    """Saves images with their trace in the PNG."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSaveImageWithTrace",
            display_name="Save Image with Safety Trace",
            category=CATEGORY,
            description="Save Image that also writes the trace as JSON into the PNG, under "
            f"{METADATA!r}, next to the workflow. Load Safety Trace reads it again.",
            search_aliases=["save image", "metadata", "png info", "trace"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Images to save, as in Save Image."),
                SafetyTraceType.Input("trace", tooltip="Trace of the run that made these images."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="Beginning of the file names. It may contain a folder.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, images: Tensor, trace: Trace, filename_prefix: str) -> io.NodeOutput:
        hidden = cls.hidden
        texts = {**(getattr(hidden, "extra_pnginfo", None) or {}), METADATA: trace.to_dict()}
        holder: Any = SimpleNamespace(
            hidden=SimpleNamespace(prompt=getattr(hidden, "prompt", None), extra_pnginfo=texts)
        )
        check_file_name(filename_prefix)
        with errors_of_saving(filename_prefix, "the output folder"):
            shown = ui.ImageSaveHelper.get_save_images_ui(images, filename_prefix, cls=holder)
        return io.NodeOutput(ui=shown)


class LoadSafetyTraceNode(io.ComfyNode):
    """Loads a trace from a file and draws it as Safety Trace does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceLoadSafetyTrace",
            display_name="Load Safety Trace",
            category=CATEGORY,
            description="Loads the trace from a PNG that Save Image with Safety Trace wrote, or "
            "from a JSON file, and shows it as Safety Trace does.",
            search_aliases=[
                "trace",
                "load trace",
                "read metadata",
                "png info",
                "report",
                "audit",
                "evidence",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=bundled_or_input_names(TRACES, SUFFIXES),
                    tooltip="PNG or JSON file with a trace, in the input folder; the first entry is a "
                    "bundled example. Copy your files into the input folder and press R to list "
                    "them.",
                ),
                theme_input(),
            ],
            outputs=[
                SafetyTraceType.Output(
                    display_name="trace",
                    tooltip="The loaded trace, for Safety Trace or Save Image with Safety Trace.",
                ),
                strip_output(),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> str:
        return content_hash(bundled_or_input_path(TRACES, file, SUFFIXES))

    @classmethod
    def execute(cls, file: str, theme: Literal["dark", "light"]) -> io.NodeOutput:
        trace = read_trace(bundled_or_input_path(TRACES, file, SUFFIXES))
        image = strip(trace, theme)
        return io.NodeOutput(trace, image, ui=message_ui(in_words(trace), ui.PreviewImage(image)))


NODES: list[type[io.ComfyNode]] = [SafetyTraceNode, SaveImageWithTraceNode, LoadSafetyTraceNode]
