"""Node that loads the bundled demo model."""

from __future__ import annotations

from comfy_api.latest import io

from .host.files.demo_model import load_demo_model


class LoadDemoModelNode(io.ComfyNode):
    """Small Stable Diffusion that draws scenes, to try the pack without any download."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceLoadDemoModel",
            display_name="Load Demo Model",
            category="safe guidance",
            description=(
                "Loads the small model that comes with this pack. It draws scenes of 128 x "
                "128 pixels with circles, squares, triangles, hearts, crosses and stars; "
                "the star stands for the unwanted concept. Use it to try a method in "
                "seconds without a download."
            ),
            search_aliases=["demo", "example model", "tiny model", "test model"],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model())


NODES: list[type[io.ComfyNode]] = [LoadDemoModelNode]
