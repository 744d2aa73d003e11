"""Node that draws annotated images of the demo world, to learn guideline tokens from."""

from __future__ import annotations

from comfy_api.latest import io

from ..demo.annotated_set import draw_annotated_set
from .shared_inputs import seed_input


class DemoAnnotatedSetNode(io.ComfyNode):
    """Annotated images of the demo world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceDemoAnnotatedSet",
            display_name="Demo Annotated Set",
            category="safe guidance/detect and guide",
            description="Draws images of the demo model's world: some with stars and their masks, "
            "and as many without stars. Use it to learn guideline tokens without "
            "collecting images.",
            search_aliases=[
                "demo",
                "example images",
                "annotated images",
                "training set",
                "dag",
                "guideline tokens",
            ],
            inputs=[
                io.Int.Input(
                    "count",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="Number of images with stars; as many without stars are added. More images "
                    "teach better and take longer. Start with 16.",
                ),
                seed_input("Seed that chooses the images. The same seed gives the same images."),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Mask.Output(display_name="masks"),
                io.Image.Output(display_name="safe_images"),
                io.String.Output(display_name="captions"),
            ],
        )

    @classmethod
    def execute(cls, count: int, seed: int) -> io.NodeOutput:
        drawn = draw_annotated_set(count, seed)
        return io.NodeOutput(drawn.images, drawn.masks, drawn.safe_images, "\n".join(drawn.captions))


NODES: list[type[io.ComfyNode]] = [DemoAnnotatedSetNode]
