"""Draw the training scenes and encode them: latents.safetensors."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

import training
from models import LATENT_SCALE, make_autoencoder

world = training.pack_module("demo.artwork_world")
renderer = training.pack_module("demo.artwork_renderer")


@torch.no_grad()
def main() -> None:
    """Draw, encode, and write latents.safetensors."""
    parser = training.argument_parser(__doc__, steps=0, batch=100)
    parser.add_argument("--scenes", type=int, default=30000)
    args = parser.parse_args()
    device = training.start(args)
    artwork = training.load_artwork(args.work, device)
    autoencoder = make_autoencoder().requires_grad_(False).eval().to(device)
    autoencoder.load_state_dict(load_file(args.work / "autoencoder.safetensors"))
    scenes = world.sample_scenes(args.scenes, world.SEEDS["training"])
    latents = []
    for start in range(0, len(scenes), args.batch):
        images = renderer.render_batch(scenes[start : start + args.batch], artwork) * 2 - 1
        latents.append((autoencoder.encode(images) * LATENT_SCALE).half().cpu())
        if start % 2000 == 0:
            training.log.info("%d scenes", start)
    with training.atomic(args.work / "latents.safetensors") as temporary:
        save_file({"latents": torch.cat(latents)}, temporary)


if __name__ == "__main__":
    main()
