"""Nodes that show the content of a negation set and its images closest to others."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..formats.negation_set import NegationSet
from ..guidance.core.references import References
from ..guidance.safe_denoiser.similarity import closest
from ..reports.contact_sheet import comparison_sheet, contact_sheet
from ..reports.set_statistics import thumbnail, thumbnails
from ..reports.set_summary import closest_in_words, summarize
from .host.engine.node_messages import message_ui
from .host.files.negation_latents import encode, encode_images, usual_size
from .io_types import NegationSetType
from .negation_set_inputs import CATEGORY


def compared_vae_input() -> io.Input:
    """Return the input for the VAE with which images are compared."""
    return io.Vae.Input(
        "vae",
        optional=True,
        tooltip="VAE of the model. With it, latents are compared, as in Safe Denoiser; without it, small "
        "copies of the images.",
    )


class PreviewNegationSetNode(io.ComfyNode):
    """Shows the images and measures of a set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidancePreviewNegationSet",
            display_name="Preview Negation Set",
            category=CATEGORY,
            description="Shows the images of a negation set on a contact sheet, with their number, "
            "sizes, source and licence, how similar they are, near duplicates, and the "
            "similarity from which Safe Denoiser acts.",
            search_aliases=["negation set", "contact sheet", "duplicates", "diversity", "calibration"],
            is_output_node=True,
            inputs=[
                NegationSetType.Input("negation_set", tooltip="Negation set to show on the contact sheet."),
                io.Int.Input(
                    "most",
                    default=64,
                    min=1,
                    max=1024,
                    tooltip="Largest number of images on the sheet, spread evenly over the set. More "
                    "make a larger sheet. Start with 64.",
                ),
                compared_vae_input(),
            ],
            outputs=[io.Image.Output(display_name="sheet"), io.String.Output(display_name="summary")],
        )

    @classmethod
    def execute(cls, negation_set: NegationSet, most: int, vae: Any = None) -> io.NodeOutput:
        sheet = contact_sheet(negation_set, most)[None]
        references = _references(negation_set, vae) if len(negation_set) > 1 else None
        summary = summarize(negation_set, references)
        return io.NodeOutput(sheet, summary, ui=message_ui(summary, ui.PreviewImage(sheet, cls=cls)))


def _references(negation_set: NegationSet, vae: Any) -> References:
    """Return the set's images as they are compared: latents, or small copies without a VAE."""
    if vae is None:
        return thumbnails(negation_set)
    return encode(negation_set, vae, *usual_size(negation_set, vae))


class FindClosestReferencesNode(io.ComfyNode):
    """Lists the images of a set that are closest to given images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceFindClosestReferences",
            display_name="Find Closest References",
            category=CATEGORY,
            description="Lists the most similar images of a negation set for each image, using the "
            "whole-image similarity of Safe Denoiser. Use it to check whether an output "
            "is a near-copy.",
            search_aliases=[
                "nearest neighbour",
                "similarity search",
                "memorization",
                "memorisation",
                "near copy",
                "plagiarism",
            ],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Images to look up, such as decoded results."),
                NegationSetType.Input("negation_set", tooltip="Negation set to search for similar images."),
                io.Int.Input(
                    "count",
                    default=3,
                    min=1,
                    max=64,
                    tooltip="Number of references to list per image. Start with 3.",
                ),
                compared_vae_input(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet", tooltip="One row per image: the image, then its closest references."
                ),
                io.String.Output(display_name="report"),
                io.Float.Output(display_name="highest", tooltip="Highest similarity found; 1 is a copy."),
            ],
        )

    @classmethod
    def execute(
        cls, images: torch.Tensor, negation_set: NegationSet, count: int, vae: Any = None
    ) -> io.NodeOutput:
        if vae is None:
            x = torch.stack([thumbnail(image[..., :3].float()) for image in images])
            references = thumbnails(negation_set)
        else:
            x = encode_images(images, vae)
            references = encode(negation_set, vae, *x.shape[-2:])
        similarities, indices = closest(x, references, count)
        report = closest_in_words(similarities, indices)
        sheet = comparison_sheet(images, negation_set, indices)[None]
        shown = message_ui(report, ui.PreviewImage(sheet, cls=cls))
        return io.NodeOutput(sheet, report, similarities.max().item(), ui=shown)


NODES: list[type[io.ComfyNode]] = [PreviewNegationSetNode, FindClosestReferencesNode]
