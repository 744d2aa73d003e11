"""Make the images of the workflows and help pages by running every demo workflow with and without its method.

`python3 dev.py make images [workflow ...]` writes two images for each workflow in workflows/: the square one
of the template browser (workflows/NAME.jpg) and the pair for the help pages of its nodes (web/docs/NAME.jpg).
Help pages without an image get such a pair.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..evaluation.example_inputs import write_example_images
from ..evaluation.graphs import Prompt, is_link, set_inputs
from ..evaluation.runner import KEEP_RESULTS, OWN_NODES, decode
from ..evaluation.server import ComfyServer
from ..evaluation.workflow_conversion import ObjectInfo, load_workflow, to_prompt

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS, DOCS = ROOT / "workflows", ROOT / "web" / "docs"
PLAIN = "demo_plain"
MODELS = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}
"""Prefixes of workflows for checkpoints.

They do not run here and show the image of the same demo workflow.
"""
SIDE, INSET, BORDER, BAND = 384, 120, 4, 44
PAIR_SIDE, GAP, CAPTION = 256, 8, 26
PAPER, INK, SHADE = (250, 250, 248), (24, 24, 28), (40, 40, 44)
QUALITY = 85
IMAGE_MARK = "!["


@dataclass(frozen=True)
class Shown:
    """Images of a workflow: with its method, and without it for the same prompt and seed, if any."""

    after: list[Image.Image]
    before: Image.Image | None


def samplers(prompt: Prompt) -> list[str]:
    """Return the ids of the nodes that sample."""
    return [
        key for key, node in prompt.items() if "latent_image" in node["inputs"] and "seed" in node["inputs"]
    ]


def text_of(prompt: Prompt, key: str) -> str | None:
    """Return the first text at or upstream of a node; None when there is none."""
    inputs = prompt[key]["inputs"]
    for name in ("text", "prompt"):
        if isinstance(inputs.get(name), str):
            return str(inputs[name])
    found = (text_of(prompt, value[0]) for value in inputs.values() if is_link(value))
    return next((text for text in found if text is not None), None)


def without_method(prompt: Prompt, plain: Prompt) -> Prompt | None:
    """Return the workflow without its method: the plain one with the same prompt and sampler settings.

    A workflow with a LoRA keeps the LoRA. The result is None when it does not have exactly one sampler.
    """
    found = samplers(prompt)
    if len(found) != 1:
        return None
    loras = [key for key, node in prompt.items() if node["class_type"] == "LoraLoaderModelOnly"]
    if loras:
        return {
            **prompt,
            found[0]: {**prompt[found[0]], "inputs": {**prompt[found[0]]["inputs"], "model": [loras[0], 0]}},
        }
    positive = prompt[found[0]]["inputs"]["positive"][0]
    text = text_of(prompt, positive)
    if text is None:
        return None
    (own,) = samplers(plain)
    shared = {
        name: value
        for name, value in prompt[found[0]]["inputs"].items()
        if name in plain[own]["inputs"] and not is_link(value)
    }
    return set_inputs(set_inputs(plain, "Prompt", text=text), "KSampler", **shared)


def run(server: ComfyServer, prompt: Prompt) -> list[Image.Image]:
    """Run a prompt and return its images, saved ones first."""
    entry = server.run(prompt)
    outputs = sorted(entry["outputs"].items(), key=lambda item: prompt[item[0]]["class_type"] != "SaveImage")
    return [
        Image.fromarray(decode(file))
        for _, output in outputs
        for file in server.images({"outputs": {"": output}})
    ]


def show(server: ComfyServer, info: ObjectInfo, name: str) -> Shown:
    """Run a demo workflow, and the plain one beside it."""
    prompt = to_prompt(load_workflow(WORKFLOWS / f"{name}.json"), info)
    plain = to_prompt(load_workflow(WORKFLOWS / f"{PLAIN}.json"), info)
    other = None if name == PLAIN else without_method(prompt, plain)
    after = run(server, prompt)
    before = run(server, other)[0] if other else None
    # A workflow without a guarded image, such as a preview of a negation set, has nothing to compare.
    return Shown(after, before if before is not None and before.size == after[0].size else None)


def thumbnail(shown: Shown) -> Image.Image:
    """Draw a square with the workflow's images, and the image without its method as an inset."""
    square = (
        grid(shown.after[:4], SIDE)
        if shown.before is None
        else shown.after[0].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    )
    draw = ImageDraw.Draw(square)
    if shown.before is not None:
        inset = shown.before.resize((INSET, INSET), Image.Resampling.LANCZOS)
        corner = (12, 12)
        draw.rectangle(
            (corner[0] - BORDER, corner[1] - BORDER, corner[0] + INSET + BORDER - 1, corner[1] + INSET + 25),
            fill=PAPER,
        )
        square.paste(inset, corner)
        draw.text((corner[0] + INSET // 2, corner[1] + INSET + 12), "without", INK, _font(18), anchor="mm")
    return square


def labelled(image: Image.Image, label: str) -> Image.Image:
    """Add a label to the bottom of a square image."""
    square = image.copy()
    draw = ImageDraw.Draw(square)
    draw.rectangle((0, SIDE - BAND, SIDE, SIDE), fill=SHADE)
    draw.text((SIDE // 2, SIDE - BAND // 2), label, PAPER, _font(24), anchor="mm")
    return square


def pair(shown: Shown) -> Image.Image:
    """Draw the images side by side with captions, for a help page."""
    images = (
        [("without", shown.before), ("with", shown.after[0])]
        if shown.before
        else [("", grid(shown.after[:4], PAIR_SIDE))]
    )
    height = PAIR_SIDE + (CAPTION if shown.before else 0)
    sheet = Image.new("RGB", (len(images) * (PAIR_SIDE + GAP) - GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (caption, image) in enumerate(images):
        left = column * (PAIR_SIDE + GAP)
        assert image is not None
        sheet.paste(image.resize((PAIR_SIDE, PAIR_SIDE), Image.Resampling.LANCZOS), (left, 0))
        draw.text((left + PAIR_SIDE // 2, PAIR_SIDE + CAPTION // 2), caption, INK, _font(17), anchor="mm")
    return sheet


def grid(images: Sequence[Image.Image], side: int) -> Image.Image:
    """Place one to four images in a square without cropping."""
    columns = 1 if len(images) == 1 else 2
    cell = side // columns
    sheet = Image.new("RGB", (side, side), SHADE)
    for number, image in enumerate(images):
        scale = cell / max(image.size)
        small = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
            Image.Resampling.LANCZOS,
        )
        left, top = number % columns * cell, number // columns * cell + (cell // 2 if len(images) == 2 else 0)
        sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
    return sheet


def illustrate_help_pages() -> None:
    """Give every help page without an image that of the simplest demo workflow with its node."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        flows = [(len(own), name) for name, own in own_nodes_of_workflows().items() if page.stem in own]
        if IMAGE_MARK in text or not flows:
            continue
        name = min(flows)[1]
        image = f"![From the workflow {name}]({name}.jpg)"
        title, paragraph, rest = ([*text.rstrip().split("\n\n", 2), ""])[:3]
        page.write_text(
            "\n\n".join(part for part in (title, paragraph, image, rest) if part).rstrip() + "\n",
            encoding="utf-8",
        )
        sys.stdout.write(f"{page.relative_to(ROOT)} shows {name}.jpg\n")


def own_nodes_of_workflows() -> dict[str, list[str]]:
    """Return this pack's node ids in every demo workflow."""
    return {
        path.stem: [
            node["type"] for node in load_workflow(path)["nodes"] if node["type"].startswith(OWN_NODES)
        ]
        for path in sorted(WORKFLOWS.glob("demo_*.json"))
    }


def is_shown_in_help(name: str) -> bool:
    """Return True when a help page shows a workflow's pair of images."""
    return any(f"({name}.jpg)" in page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))


def save(image: Image.Image, path: Path) -> None:
    """Save a JPEG and print its path and size."""
    image.save(path, quality=QUALITY, optimize=True)
    sys.stdout.write(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.0f} kB\n")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def main(argv: Sequence[str]) -> int:
    """Make the images of these workflows, of all by default."""
    parser = argparse.ArgumentParser(prog="dev.py make images", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="workflow", help="such as demo_plain (default: every demo workflow)"
    )
    names = parser.parse_args(argv).names or list(own_nodes_of_workflows())
    illustrate_help_pages()
    with ComfyServer(options=KEEP_RESULTS) as server:
        write_example_images(server.base / "input")
        info = server.get_json("/object_info")
        for name in names:
            shown = show(server, info, name)
            save(thumbnail(shown), WORKFLOWS / f"{name}.jpg")
            if is_shown_in_help(name):
                save(pair(shown), DOCS / f"{name}.jpg")
    for prefix, model in MODELS.items():
        for path in sorted(WORKFLOWS.glob(f"{prefix}_*.json")):
            with Image.open(WORKFLOWS / f"demo_{path.stem.removeprefix(f'{prefix}_')}.jpg") as image:
                save(labelled(image, model), path.with_suffix(".jpg"))
    return 0
