"""Learn the bundled guideline tokens of the demo model from drawn scenes with and without stars.

Needs a ComfyUI (the folder in SAFE_GUIDANCE_HOST), whose text encoder and attention it uses. Takes minutes on
a CPU.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import common

SIGMAS = (6.0, 4.5, 3.0, 2.0, 1.2)
"""Noise levels for learning: above them the maps are blurred, below them the shapes are fixed."""
SOURCE = "learnt by tools/demo_model/make_guideline_tokens.py"
LICENCE = "GPL-3.0-or-later"


def main() -> None:
    """Train the tokens and save them."""
    parser = common.argument_parser(__doc__, steps=600, batch=16)
    parser.add_argument("--count", type=int, default=400, help="images with a star, and as many without")
    parser.add_argument("--tokens", type=int, default=16, help="tokens for the concept")
    parser.add_argument("--seed", type=int, default=31, help="of the scenes, the noise and the optimisation")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        common.pack_module("evaluation.host").import_host(Path(base))
        learn(args.count, args.tokens, args.steps, args.batch, args.seed)


@torch.inference_mode()
def learn(count: int, tokens: int, iterations: int, batch: int, seed: int) -> None:
    """Draw the images, train the tokens, and save the file."""
    files = common.pack_module("formats.guideline_token_file")
    annotate = common.pack_module("guidance.detect_and_guide.annotated_images").annotate
    record_images = common.pack_module("nodes.host.attention.given_images").record_images
    learn_tokens = common.pack_module("nodes.host.attention.token_learning").learn
    settings = common.pack_module("guidance.detect_and_guide.token_optimization").OptimizationSettings(
        "contrast", iterations, None, 2, batch, seed
    )
    scenes = common.pack_module("demo.annotated_set").draw_annotated_set(count, seed)
    model, clip, vae = common.pack_module("nodes.host.files.demo_model").load_demo_model()
    example = annotate(scenes.images, scenes.masks, scenes.safe_images)
    cache = record_images(model, clip, vae, example, scenes.captions, SIGMAS, (2,), seed)
    learnt = learn_tokens(model, clip, example, cache, "star", tokens, settings)
    common.log.info("%s", learnt.report)
    path = common.ASSETS / "guideline_tokens" / "demo_star.safetensors"
    files.save(replace(learnt.tokens, name="demo_star", source=SOURCE, licence=LICENCE), path)
    common.log.info("%s: %.0f kB", path.name, path.stat().st_size / 1e3)


if __name__ == "__main__":
    main()
