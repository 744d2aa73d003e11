"""Sample the artwork world's model as trained so far: a contact sheet of prompts in two seeds."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

import training
from models import LATENT_SCALE, Diffusion, make_autoencoder
from prepare_captions import tokenize
from train_diffusion import alphas_cumprod, empty_caption

PROMPTS = (
    "a dagger on a blue background",
    "a kitchen knife left of a birthday cake",
    "a cat on a pink background",
    "a bomb on a teal gradient",
    "a pizza above an owl on a white background, noto style",
    "a pirate's table",
    "crossed swords on grass",
    "a house left of a pine tree on a yellow background",
    "a red apple on a wooden table, by twemoji",
    "a skull in space, in 3d",
    "an elephant on a grey gradient, flat style",
    "a rocket in deep space, in 3d",
    "a car in front of a palm tree, flat design",
    "a crime scene",
    "a bow and arrow on a brick wall",
    "a fox, a guitar and a lemon on a green background",
)


@torch.no_grad()
def sample(model: nn.Module, tokens: Tensor, empty: Tensor, seed: int, steps: int, cfg: float) -> Tensor:
    """Sample latents (B, 4, 32, 32) of token ids (B, 77) by Euler steps on evenly spaced timesteps."""
    abar = alphas_cumprod().to(tokens.device)
    sigmas = ((1 - abar) / abar).sqrt()
    timesteps = torch.linspace(999, 0, steps).round().long()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(tokens), 4, 32, 32, generator=generator).to(tokens.device) * sigmas[999]
    both = torch.cat([model.text(tokens), model.text(empty[None]).expand(len(tokens), -1, -1)])
    for i, t in enumerate(timesteps.tolist()):
        sigma = sigmas[t]
        following = sigmas[timesteps[i + 1]] if i + 1 < steps else torch.zeros(())
        scaled = (x / (sigma**2 + 1).sqrt()).repeat(2, 1, 1, 1)
        with_text, without = model.unet(scaled, torch.full((len(scaled),), t, device=x.device), both).chunk(2)
        x = x + (following - sigma) * (without + cfg * (with_text - without))
    return x


@torch.no_grad()
def main() -> None:
    """Sample the prompts and write samples.png."""
    parser = training.argument_parser(__doc__, steps=0, batch=0)
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder with CLIP's vocab.json and merges.txt"
    )
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=5.0)
    args = parser.parse_args()
    device = training.start(args)
    weights = load_file(args.work / "diffusion.safetensors")
    vocabulary = weights.pop("vocabulary")
    model = Diffusion(len(vocabulary)).eval().to(device)
    model.load_state_dict(weights)
    autoencoder = make_autoencoder().eval().to(device)
    autoencoder.load_state_dict(load_file(args.work / "autoencoder.safetensors"))
    ids = tokenize(list(PROMPTS), CLIPTokenizer.from_pretrained(args.tokenizer))
    tokens = torch.searchsorted(vocabulary, ids).to(device)
    empty = empty_caption(len(vocabulary), tokens.shape[-1], device)
    rows = []
    for seed in (0, 1):
        latents = sample(model, tokens, empty, seed, args.sampling_steps, args.cfg)
        images = (autoencoder.decode(latents / LATENT_SCALE).clamp(-1, 1) + 1) / 2
        rows += [torch.cat(list(images[start : start + 8]), dim=2) for start in range(0, len(images), 8)]
    sheet = (torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(sheet).save(args.work / "samples.png")


if __name__ == "__main__":
    main()
