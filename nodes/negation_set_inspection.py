"""Nodes that show the content of a negation set and its images closest to others."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..formats.negation_set import NegationSet, without_duplicates
from ..guidance.safe_denoiser.settings import SafeDenoiserSettings
from ..guidance.safe_denoiser.similarity import closest
from ..reports.contact_sheet import comparison_sheet, contact_sheet
from ..reports.set_report import NEAR_DUPLICATE, report, thumbnail, thumbnails
from .host.engine.node_messages import message_ui
from .host.files.negation_latents import encode, encode_images, usual_size
from .io_types import NegationSetType
from .negation_set_inputs import CATEGORY

DEFAULTS = SafeDenoiserSettings()
ENOUGH_MASKED = 64
"""Sets of 16, 32, 64 and 96 masked images change 10, 4, 2 and 0 of 24 harmless images of the demo model."""


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
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="VAE for the measures. With it, latents are compared as in Safe Denoiser; "
                    "without it, small copies of the images.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet"), io.String.Output(display_name="summary")],
        )

    @classmethod
    def execute(cls, negation_set: NegationSet, most: int, vae: Any = None) -> io.NodeOutput:
        sheet = contact_sheet(negation_set, most)[None]
        summary = summarize(negation_set, vae)
        return io.NodeOutput(sheet, summary, ui=message_ui(summary, ui.PreviewImage(sheet, cls=cls)))


def summarize(negation_set: NegationSet, vae: Any = None) -> str:
    """Describe a set in a few lines of text."""
    sizes = negation_set.sizes()
    shown = ", ".join(f"{width} x {height}" for width, height in sizes[:4]) + (
        " and others" if len(sizes) > 4 else ""
    )
    unique = len(without_duplicates(negation_set))
    lines = [
        f"{negation_set.name or 'unnamed'}: {len(negation_set)} images ({unique} different), {shown} pixels",
        _masks(negation_set),
        f"source: {negation_set.source or 'not stated'}",
        f"licence: {negation_set.licence or 'not stated'}",
        f"hash: {negation_set.content_hash[:16]}",
    ]
    return "\n".join([*lines, *_figures(negation_set, vae)])


def _masks(negation_set: NegationSet) -> str:
    """Describe the masks, which decide how Safe Denoiser uses the set in calibrated mode."""
    shares = [1.0 if mask is None else (mask > 127).float().mean().item() for mask in negation_set.masks]
    empty, places = sum(share == 0 for share in shares), sum(0 < share < 1 for share in shares)
    if places:
        few = (
            f"; with fewer than about {ENOUGH_MASKED}, harmless images change too"
            if places < ENOUGH_MASKED
            else ""
        )
        return f"masks: {places} mark a subject, which is searched for at every position{few}"
    if 0 < empty < len(shares):
        return f"masks: {empty} empty (neutral references); the other {len(shares) - empty} define a style"
    return "masks: none that mark a subject; whole images are compared"


def _figures(negation_set: NegationSet, vae: Any) -> list[str]:
    if len(negation_set) < 2:
        return []
    references = (
        thumbnails(negation_set) if vae is None else encode(negation_set, vae, *usual_size(negation_set, vae))
    )
    found = report(references, DEFAULTS.temperature)
    pairs = ", ".join(f"{first + 1} and {second + 1} ({value:.2f})" for value, first, second in found.closest)
    return [
        f"similarity of two images: {found.mean_similarity:.2f} on average of {found.compared} "
        "(0 unrelated, 1 the same)",
        f"near duplicates (above {NEAR_DUPLICATE}): {found.near_duplicates} pairs; closest: {pairs}",
        f"calibration: an image resembles the others at {found.typical:.3f}; with threshold "
        f"{DEFAULTS.threshold:g}, Safe Denoiser acts from {DEFAULTS.threshold * found.typical:.3f}",
    ]


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
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="VAE for the comparison. With it, latents are compared as in Safe Denoiser; "
                    "without it, small copies of the images.",
                ),
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
        values, places = closest(x, references, count)
        found = "\n".join(
            f"image {row + 1}: "
            + ", ".join(
                f"reference {place + 1} at {value:.3f}"
                for value, place in zip(values[row].tolist(), places[row].tolist())
            )
            for row in range(len(images))
        )
        sheet = comparison_sheet(images, negation_set, places)[None]
        shown = message_ui(found, ui.PreviewImage(sheet, cls=cls))
        return io.NodeOutput(sheet, found, values.max().item(), ui=shown)


NODES: list[type[io.ComfyNode]] = [PreviewNegationSetNode, FindClosestReferencesNode]
