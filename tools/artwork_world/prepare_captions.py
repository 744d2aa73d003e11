"""Write the captions of the training scenes as tokens of CLIP's tokenizer: captions.safetensors.

Only this script needs the tokenizer. The file holds rows of the world's vocabulary, and the vocabulary.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

import training  # puts the folder of the next import on the path
from networks import TEXT_LENGTH

world = training.pack_module("demo.artwork_world")
CAPTIONS_PER_SCENE = 4
END_OF_TEXT = 49407
VOCABULARY_SCENES = 60000
"""Scenes whose captions give the vocabulary, so that it does not depend on the number of training scenes."""


def tokenize(captions: list[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Return CLIP's token ids, padded with the end-of-text token as the host does: (N, 77)."""
    tokens = torch.full((len(captions), TEXT_LENGTH), END_OF_TEXT)
    for row, ids in zip(tokens, tokenizer(captions)["input_ids"]):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def describe_all(count: int, captions: int) -> list[str]:
    """Write several captions for each of the first training scenes."""
    rng = random.Random(world.SEEDS["training"])
    scenes = world.sample_scenes(count, world.SEEDS["training"])
    return [world.describe(scene, rng) for scene in scenes for _ in range(captions)]


def main() -> None:
    """Describe, tokenise, and write captions.safetensors."""
    parser = training.argument_parser(__doc__, steps=0, batch=0)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="folder with CLIP's vocab.json and merges.txt (the host has one: comfy/sd1_tokenizer)",
    )
    args = parser.parse_args()
    training.start(args)
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    vocabulary = torch.unique(tokenize(describe_all(VOCABULARY_SCENES, 1), tokenizer))
    tokens = tokenize(describe_all(args.scenes, CAPTIONS_PER_SCENE), tokenizer)
    rows = torch.searchsorted(vocabulary, tokens)
    if not torch.equal(vocabulary[rows.clamp(max=len(vocabulary) - 1)], tokens):
        parser.error("a caption has a token that the vocabulary lacks: raise VOCABULARY_SCENES")
    training.log.info("%d scenes, %d tokens in the vocabulary", args.scenes, len(vocabulary))
    captions = rows.view(args.scenes, CAPTIONS_PER_SCENE, TEXT_LENGTH).to(torch.int16)
    with training.atomic(args.work / "captions.safetensors") as temporary:
        save_file({"captions": captions, "vocabulary": vocabulary}, temporary)


if __name__ == "__main__":
    main()
