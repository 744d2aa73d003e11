"""Draw the training scenes, encode them to latents and tokenise their captions with CLIP's tokenizer."""

from __future__ import annotations

import random

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import common
import world

networks = common.pack_module("demo.networks")
CAPTIONS_PER_SCENE = 3
START_OF_TEXT, END_OF_TEXT, LENGTH = 49406, 49407, 77


def main() -> None:
    """Write latents, captions and vocabulary."""
    parser = common.argument_parser(__doc__, steps=0, batch=100)
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="folder with CLIP's vocab.json and merges.txt (the host has one: comfy/sd1_tokenizer)",
    )
    args = parser.parse_args()
    autoencoder = networks.Autoencoder().requires_grad_(False)
    autoencoder.load_state_dict(load_file(args.work / "autoencoder.safetensors"))
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    rng = random.Random(7)

    scenes = world.sample_scenes(args.scenes, seed=7)
    latents = []
    for start in range(0, len(scenes), args.batch):
        images = world.render_batch(scenes[start : start + args.batch]) * 2 - 1
        latents.append((autoencoder.encode(images) * networks.LATENT_SCALE).half())
        if start % 4000 == 0:
            common.log.info("%d scenes", start)

    captions = [world.write_caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    tokens = torch.full((len(captions), LENGTH), END_OF_TEXT)
    for row, ids in zip(tokens, tokenizer(captions)["input_ids"]):
        row[: len(ids)] = torch.tensor(ids)
    vocabulary, rows = torch.unique(tokens, return_inverse=True)
    common.log.info(
        "%d different tokens, longest caption %d", len(vocabulary), (tokens != END_OF_TEXT).sum(-1).max() + 1
    )
    save_file(
        {
            "latents": torch.cat(latents),
            "captions": rows.view(len(scenes), CAPTIONS_PER_SCENE, LENGTH).to(torch.int16),
            "vocabulary": vocabulary,
        },
        args.work / "data.safetensors",
    )


if __name__ == "__main__":
    main()
