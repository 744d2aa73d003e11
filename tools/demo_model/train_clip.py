"""Train a small CLIP on drawn scenes, and measure how well it recognises styles and shapes.

Every batch has captions of one kind: whole descriptions, or only the style, or only a shape. All images with
the same caption count as matches, so that short texts get their general meaning.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import common
import world

FORMAT = common.pack_module("formats.clip_file").FORMAT
CONFIG = {
    "embed_dim": 64,
    "vision": {
        "image_size": 64,
        "layers": 3,
        "width": 96,
        "head_width": 32,
        "patch_size": 8,
        "mlp_ratio": 3.0,
    },
    "text": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
KINDS = ("whole", "style", "style", "shape")
LEARNING_RATE = 1.5e-3
NEUTRAL_TEXTS = ("art", "a painting", "a drawing", "a picture")
"""Texts whose words the vocabulary has besides those of captions. The bundled file was made with these."""
STYLE_TEXTS = [word for words in world.STYLE_WORDS.values() for word in words]


def caption(scene: world.Scene, kind: str, rng: random.Random) -> str:
    """Describe a scene, or only its style or one of its shapes."""
    if kind == "style":
        return rng.choice(world.STYLE_WORDS[scene.style])
    if kind == "shape":
        return "a " + rng.choice(world.SHAPE_WORDS[rng.choice(scene.shapes).name])
    return world.write_caption(scene, rng)


def texts_of(scenes: list[world.Scene], rng: random.Random) -> list[str]:
    """Describe every scene twice in each way, so that the vocabulary has all words of captions."""
    kinds = ("whole", "style", "shape")
    return [caption(scene, kind, rng) for scene in scenes for kind in kinds for _ in range(2)]


def images_of(scenes: list[world.Scene], size: int) -> Tensor:
    """Render images (N, 3, size, size) as bytes."""
    parts = [
        F.interpolate(world.render_batch(scenes[i : i + 100]), (size, size), mode="bicubic", antialias=True)
        for i in range(0, len(scenes), 100)
    ]
    return (torch.cat(parts).clamp(0, 1) * 255).round().byte()


def augment(pixels: Tensor) -> Tensor:
    """Convert bytes to [-1, 1] for the vision tower, with noise and another contrast."""
    x = pixels.float() / 255
    x = 0.5 + (x - 0.5) * (1 - 0.3 * torch.rand(len(x), 1, 1, 1)) + 0.05 * torch.randn(len(x), 3, 1, 1)
    return (x + 0.1 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)).clamp(0, 1) * 2 - 1


def contrastive_loss(images: Tensor, texts: Tensor, captions: list[str], scale: Tensor) -> Tensor:
    """Compute the symmetric cross-entropy in which every pair with equal captions is a match."""
    same = torch.tensor([[a == b for b in captions] for a in captions]).float()
    logits = scale * images @ texts.T
    return (
        F.cross_entropy(logits, same / same.sum(1, keepdim=True))
        + F.cross_entropy(logits.T, same / same.sum(0, keepdim=True).T)
    ) / 2


@torch.no_grad()
def measure(
    network: open_clip.CLIP, tokenize: open_clip.SimpleTokenizer, scenes: list[world.Scene], pixels: Tensor
) -> dict[str, float]:
    """Measure the share of held-out images whose style, and whose single shape, has the most similar text."""
    images = network.encode_image(pixels.float() / 127.5 - 1, normalize=True)
    right = {}
    for name, words, truth in (
        ("style", world.STYLE_WORDS, [scene.style for scene in scenes]),
        (
            "shape",
            world.SHAPE_WORDS,
            [scene.shapes[0].name if len(scene.shapes) == 1 else "" for scene in scenes],
        ),
    ):
        texts = network.encode_text(
            tokenize([("a " if name == "shape" else "") + words[key][0] for key in words]), normalize=True
        )
        found = (images @ texts.T).argmax(1).tolist()
        known = [(list(words)[index], true) for index, true in zip(found, truth) if true]
        right[name] = round(sum(a == b for a, b in known) / len(known), 4)
    return right


def save(network: open_clip.CLIP, tokens: Tensor, path: Path) -> None:
    """Save in half precision, with only those rows of the text table that captions use."""
    rows = tokens.unique()
    tensors = {
        name: tensor.half().contiguous()
        for name, tensor in network.state_dict().items()
        if name != "attn_mask"
    }
    table = tensors.pop("token_embedding.weight")
    tensors |= {"vocabulary": rows.int(), "token_embedding.rows": table[rows].clone()}
    save_file(tensors, path, metadata={"format": FORMAT, "configuration": json.dumps(CONFIG)})


def main() -> None:
    """Train the CLIP, measure it and save it."""
    parser: argparse.ArgumentParser = common.argument_parser(__doc__, steps=700, batch=64)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=common.ASSETS / "demo_model" / "clip.safetensors")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    scenes, held_out = world.sample_scenes(args.scenes, 300), world.sample_scenes(400, 301)
    size = CONFIG["vision"]["image_size"]
    pixels, held_out_pixels = images_of(scenes, size), images_of(held_out, size)
    network = open_clip.CLIP(
        CONFIG["embed_dim"],
        open_clip.CLIPVisionCfg(**CONFIG["vision"]),
        open_clip.CLIPTextCfg(**CONFIG["text"]),
    )
    tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["text"]["context_length"])
    used = [tokenize(texts_of(scenes, rng)), tokenize(list(NEUTRAL_TEXTS) + STYLE_TEXTS)]
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    progress = common.Progress(100, args.batch)
    for step, factor in enumerate(common.schedule(args.steps, 50, 0.6)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        chosen = rng.sample(range(len(scenes)), args.batch)
        kind = KINDS[step % len(KINDS)]
        captions = [caption(scenes[i], kind, rng) for i in chosen]
        images, texts, scale = network(augment(pixels[chosen]), tokenize(captions))
        loss = contrastive_loss(images, texts, captions, scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        progress.update(step, loss)
    common.log.info("held-out pixels: %s", measure(network.eval(), tokenize, held_out, held_out_pixels))
    save(network, torch.cat(used).flatten(), args.output)


if __name__ == "__main__":
    main()
