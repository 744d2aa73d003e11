"""Derive the workflows for real checkpoints from those on the demo model: `python3 dev.py make workflows`.

A checkpoint's workflow differs from the demo's in its loader, which names the file and where it comes from, in the image's size, the
texts and the settings: every node of this pack gets its defaults, which are the papers' values, and what a recipe says on top.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..evaluation.graphs import AFTER_GENERATE, SEEDS, WIDGET_TYPES, ObjectInfo, load_workflow
from ..evaluation.runner import OWN_NODES
from ..evaluation.server import ComfyServer

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
LOADER, LOADER_SIZE = "CheckpointLoaderSimple", [300, 98]
DEMO_LOADER = "SafeGuidanceLoadDemoModel"
REPLACED_HEIGHT = 120
SAMPLER = {"steps": 25, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}

Node: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A model that many people have: the prefix of its workflows, its file, where it comes from, and the size of its images."""

    prefix: str
    name: str
    file: str
    url: str
    side: int


CHECKPOINTS = (
    Checkpoint(
        "sd15",
        "Stable Diffusion 1.5",
        "v1-5-pruned-emaonly-fp16.safetensors",
        "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
        512,
    ),
    Checkpoint(
        "sdxl",
        "SDXL",
        "sd_xl_base_1.0.safetensors",
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
        1024,
    ),
)


@dataclass(frozen=True)
class Recipe:
    """What a method's workflow says and sets for checkpoints.

    `texts` are by node title, `settings` by node class or title; `replaced` gives another class to nodes whose files fit the demo model
    only, and what that needs comes from the model's loader.
    """

    note: str
    texts: Mapping[str, str]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)


RECIPES = {
    "build_negation_set": Recipe(
        note="""## Not like these four images

1. The model paints four images in the style that you do **not** want.
2. **Build Negation Set** collects them. Replace this group by *Load Image* if you have images of your own.
3. **Preview Negation Set** shows what is in the set.
4. **Safe Denoiser** keeps another image away from them, with another prompt and seed.

Four images are enough to try. A set for real use has fifty or more. Compare with *strength* 0, which is off.

Whole images are compared here, by their layout and colours. To avoid a style whatever the image shows, add images that are fine, as
the workflow *demo safe denoiser style* does.""",
        texts={
            "Example prompt": "oil painting in the style of van Gogh, swirling brush strokes, starry night over a village",
            "Prompt": "a village at night under a starry sky, painting",
        },
        settings={
            "SafeGuidanceBuildNegationSet": {
                "name": "swirling brush strokes",
                "source": "painted by this workflow",
                "licence": "",
            },
            "SafeGuidanceSafeDenoiser": {"strength": 0.9},
        },
    ),
    "stg_nudenet": Recipe(
        note="""## Safe Text Embedding Guidance with NudeNet

While the image is sampled, a detector of nudity looks at what it is going to be; where it objects, the prompt's embedding moves so
that the model paints something else.

Needs the package *nudenet* in ComfyUI's Python: "pip install nudenet onnx onnx2torch", or its ONNX file in *models/safety*.

**Try**

- *rho* 0: the plain image
- another prompt: an image that the detector does not object to comes out exactly as without the node
- *CLIP Concept Safety Function* instead, for violence or a style""",
        texts={"Prompt": "marble statue of Venus in a sunny garden, photograph"},
    ),
    "sld_medium": Recipe(
        note="""## Safe Latent Diffusion

The guidance is turned away from a **safety text**: by default the paper's list, from hate to illegal activity. Costs one more model
evaluation a step.

**Try**

- *preset* strong or max, when medium leaves too much; weak, when it changes too much
- a *safety_text* of your own: few and exact words act more precisely""",
        texts={"Prompt": "a knight after a fierce battle, dramatic light, detailed oil painting"},
    ),
    "safree": Recipe(
        note="""## SAFREE: a filtered prompt

*SAFREE Text Filter* stands in for *CLIP Text Encode*: it finds the words of the prompt that belong to the **concepts** and takes what
they have in common with them out of their embeddings. Costs nothing while sampling. The report under the node says which words were
filtered.

**Try**

- a prompt without the concepts: its image is exactly the plain one
- the node's default concepts, which are the paper's for nudity""",
        texts={"Prompt": "a village at night under a starry sky, painting in the style of Vincent van Gogh"},
        settings={
            "SafeGuidanceSafreeTextFilter": {
                "concepts": "Vincent van Gogh, van Gogh style, swirling brush strokes"
            }
        },
    ),
    "semantic_guidance": Recipe(
        note="""## Semantic Guidance

The image is steered away from the concepts under *remove* and towards those under *add*, in the places where a concept shows most.
Costs one more model evaluation a step and concept.

**Try**

- "smile" under *add*, and nothing under *remove*
- more *scale* and a lower *threshold*: stronger, and more of the image changes""",
        texts={"Prompt": "portrait of a man with glasses reading a newspaper in a cafe, photograph"},
        settings={"SafeGuidanceSemanticGuidance": {"remove": "glasses"}},
    ),
    "dag": Recipe(
        note="""## DAG: found in the model's own attention, changed only there

While the image is sampled, **guideline tokens** are looked for in the model's cross-attention: here, those of the word *dog*. Where
they are found the guidance turns away from the *Safety text*; an image without them comes out exactly as without the node.

Tokens made from words alone are a first look. *Optimize Guideline Tokens* learns better ones from a few images with masks:
*demo learn guideline tokens* shows how.

**Try**

- a prompt without a dog: nothing changes, and nothing is paid
- *DAG Detection Map* behind the sampler: what was seen, and where""",
        texts={"Prompt": "a dog and a cat sitting on a sofa, photograph", "Safety text": "dog"},
        settings={"SafeGuidanceGuidelineTokensFromText": {"words": "dog"}},
        replaced={"SafeGuidanceLoadGuidelineTokens": "SafeGuidanceGuidelineTokensFromText"},
    ),
    "guarded_and_unguarded": Recipe(
        note="""## Guarded and Unguarded

One node samples the same image twice, with and without the safe guidance on the MODEL, and measures how they differ. The unguarded
image is blurred unless you switch *blur_unguarded* off.

**Try**

- a harmless prompt: how much does its image change?
- any other node of *safe guidance* instead of, or after, *Safe Latent Diffusion*""",
        texts={"Prompt": "a knight after a fierce battle, dramatic light, detailed oil painting"},
        settings={"SafeGuidanceSafeLatentDiffusion": {"preset": "strong"}},
    ),
}


def widgets(info: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Name and description of a node class's inputs that have a widget, in the editor's order."""
    for name, spec in sockets(info):
        kind = "COMBO" if isinstance(spec[0], list) else spec[0]
        if kind in WIDGET_TYPES and not _options(spec).get("forceInput"):
            yield name, spec


def sockets(info: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Name and description of all inputs of a node class."""
    for section in ("required", "optional"):
        described = info["input"].get(section, {})
        for name in info.get("input_order", {}).get(section, described):
            yield name, described[name]


def _options(spec: Sequence[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def _default(spec: Sequence[Any]) -> Any:
    choices = spec[0] if isinstance(spec[0], list) else _options(spec).get("options")
    return _options(spec).get("default", choices[0] if choices else "")


def read_widgets(node: Node, info: Mapping[str, Any]) -> dict[str, Any]:
    """A node's widget values by name."""
    rest, found = list(node.get("widgets_values") or []), {}
    for name, spec in widgets(info):
        if not rest:
            break
        found[name] = rest.pop(0)
        if _is_followed(name, spec) and rest and rest[0] in AFTER_GENERATE:
            rest.pop(0)
    return found


def write_widgets(node: Node, info: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Set a node's widgets: these values, and the defaults of the others."""
    written: list[Any] = []
    for name, spec in widgets(info):
        written.append(values.get(name, _default(spec)))
        if _is_followed(name, spec):
            written.append("fixed")
    node["widgets_values"] = written


def _is_followed(name: str, spec: Sequence[Any]) -> bool:
    """Whether the editor puts "control after generate" behind this widget."""
    return bool(_options(spec).get("control_after_generate")) or (spec[0] == "INT" and name in SEEDS)


def derive(name: str, recipe: Recipe, checkpoint: Checkpoint, info: ObjectInfo) -> dict[str, Any]:
    """The workflow of a demo workflow's method for a checkpoint."""
    workflow = copy.deepcopy(load_workflow(FOLDER / f"demo_{name}.json"))
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"safe-guidance/{checkpoint.prefix}_{name}"))
    loader = next(node for node in workflow["nodes"] if node["type"] == DEMO_LOADER)
    for node in workflow["nodes"]:
        if node["type"] in recipe.replaced:
            _replace(node, recipe.replaced[node["type"]], loader, workflow, info)
        _adapt(node, name, recipe, checkpoint, info)
    return workflow


def _replace(node: Node, kind: str, loader: Node, workflow: dict[str, Any], info: ObjectInfo) -> None:
    """Give a node without linked inputs another class with the same outputs; its inputs come from the loader, by their types."""
    node["type"], node["inputs"] = kind, []
    node["properties"]["Node name for S&R"] = kind
    node["size"] = [node["size"][0], max(node["size"][1], REPLACED_HEIGHT)]
    slots = {output["type"]: slot for slot, output in enumerate(loader["outputs"])}
    own = {key for key, _ in widgets(info[kind])}
    # The editor lists sockets before widgets.
    for name, spec in sorted(sockets(info[kind]), key=lambda item: item[0] in own):
        if name in own:
            node["inputs"].append({"name": name, "type": spec[0], "widget": {"name": name}, "link": None})
        elif spec[0] in slots:
            workflow["last_link_id"] += 1
            link = [
                workflow["last_link_id"],
                loader["id"],
                slots[spec[0]],
                node["id"],
                len(node["inputs"]),
                spec[0],
            ]
            workflow["links"].append(link)
            loader["outputs"][slots[spec[0]]]["links"] = [
                *(loader["outputs"][slots[spec[0]]]["links"] or []),
                link[0],
            ]
            node["inputs"].append({"name": name, "type": spec[0], "link": link[0]})


def _adapt(node: Node, name: str, recipe: Recipe, checkpoint: Checkpoint, info: ObjectInfo) -> None:
    kind = node["type"]
    if kind == "MarkdownNote":
        node["widgets_values"] = [recipe.note]
        return
    if kind == DEMO_LOADER:
        _load_checkpoint(node, checkpoint)
        return
    described = info[kind]
    values = {} if kind.startswith(OWN_NODES) else read_widgets(node, described)
    if kind.startswith(OWN_NODES) and kind not in recipe.replaced.values():
        values |= {key: value for key, value in read_widgets(node, described).items() if key in SEEDS}
    own = {key for key, _ in widgets(described)}
    if {"width", "height"} <= own:
        values |= {"width": checkpoint.side, "height": checkpoint.side}
    if {"seed", "cfg"} <= own:
        values |= SAMPLER
    if kind == "SaveImage":
        values["filename_prefix"] = f"safe_guidance/{checkpoint.prefix}_{name}"
    title = node.get("title", "")
    if title in recipe.texts:
        values[next(key for key in ("text", "prompt") if key in own)] = recipe.texts[title]
    values |= {**recipe.settings.get(kind, {}), **recipe.settings.get(title, {})}
    if own:
        write_widgets(node, described, values)


def _load_checkpoint(node: Node, checkpoint: Checkpoint) -> None:
    """Turn the demo model's loader into that of a checkpoint, which has the same outputs."""
    model = {"name": checkpoint.file, "url": checkpoint.url, "directory": "checkpoints"}
    node["type"], node["size"] = LOADER, LOADER_SIZE
    node["inputs"] = [{"name": "ckpt_name", "type": "COMBO", "widget": {"name": "ckpt_name"}, "link": None}]
    node["properties"] = {"cnr_id": "comfy-core", "Node name for S&R": LOADER, "models": [model]}
    node["widgets_values"] = [checkpoint.file]


def main(argv: Sequence[str]) -> int:
    """Write every recipe's workflow for every checkpoint."""
    argparse.ArgumentParser(
        prog="dev.py make workflows", description=(__doc__ or "").splitlines()[0]
    ).parse_args(argv)
    with ComfyServer(device="cpu") as server:
        info = server.get_json("/object_info")
    for name, recipe in RECIPES.items():
        for checkpoint in CHECKPOINTS:
            path = FOLDER / f"{checkpoint.prefix}_{name}.json"
            path.write_text(
                json.dumps(derive(name, recipe, checkpoint, info), indent=2, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )
            sys.stdout.write(f"workflows/{path.name}\n")
    return 0
