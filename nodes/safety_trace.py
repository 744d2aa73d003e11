"""Safety Trace: what every correction did at each step, to look at, to read, and to keep with the image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ..reports.trace import Trace, in_words, table
from ..reports.trace_strip import strip
from .host.engine.hooks import trace_of
from .host.engine.node_messages import message_ui
from .io_types import SafetyTraceType

CATEGORY = "safe guidance/evidence"
METADATA = "safety_trace"
"""Key of the trace among a PNG's texts."""


def traced(model: ModelPatcher | None, latent: dict[str, Any] | None, trace: Trace | None) -> Trace:
    """The given trace, or the one of the run in which `model` sampled `latent`.

    Raises:
        ValueError: when neither is known.
    """
    if trace is not None:
        return trace
    if model is None or latent is None:
        raise ValueError(
            "There is nothing to trace. Connect a trace, or the guarded MODEL and the LATENT that a sampler made with it."
        )
    found = trace_of(model, latent["samples"])
    if found is None:
        raise ValueError(
            "This latent was not sampled with this MODEL, or too many others since. Connect the very MODEL that goes into the sampler and "
            "the sampler's own LATENT, and queue with another seed."
        )
    return found


class SafetyTrace(io.ComfyNode):
    """Guarded MODEL and sampled LATENT in, what happened out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafetyTrace",
            display_name="Safety Trace",
            category=CATEGORY,
            description="Shows what the methods did while an image was sampled: when, how hard, and at what cost. Connect the MODEL that "
            "goes into the sampler and the LATENT that comes out.",
            search_aliases=["trace", "report", "did it do anything", "evidence", "log", "audit"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="The guarded model, as it goes into the sampler."
                ),
                io.Latent.Input("latent", optional=True, tooltip="What the sampler made with that model."),
                SafetyTraceType.Input(
                    "trace", optional=True, tooltip="A trace, instead of model and latent."
                ),
                io.Combo.Input("theme", options=["dark", "light"], tooltip="Background of the image."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="strip",
                    tooltip="A lane per method and a bar per model call, noise on the left.",
                ),
                io.String.Output(display_name="table", tooltip="Every record as text."),
                io.String.Output(display_name="json", tooltip="The whole trace as JSON."),
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


class SaveImageWithTrace(io.ComfyNode):
    """Save Image that also writes the trace."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSaveImageWithTrace",
            display_name="Save Image with Safety Trace",
            category=CATEGORY,
            description=f"Save Image, with the trace as JSON among the PNG's texts under {METADATA!r}, beside the workflow.",
            search_aliases=["save image", "metadata", "png info", "trace"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to save."),
                SafetyTraceType.Input("trace", tooltip="The trace of the run that made them."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="Beginning of the file names; may name a folder.",
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
        return io.NodeOutput(ui=ui.ImageSaveHelper.get_save_images_ui(images, filename_prefix, cls=holder))


NODES: list[type[io.ComfyNode]] = [SafetyTrace, SaveImageWithTrace]
