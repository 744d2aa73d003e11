"""Train the artwork world's text encoder and UNet together.

Epsilon prediction on Stable Diffusion 1.x's noise schedule.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import training
from models import Diffusion

EMPTY_CAPTION_SHARE = 0.1
HIGH_NOISE_SHARE = 0.5
OFFSET_NOISE = 0.1
"""Standard deviation of a per-channel constant added to the noise.

Without it the model reads an image's mean from the noisiest latents.
"""
EDGES = ("unet.input_blocks.0", "unet.out.", "text.text_model.embeddings")
"""Prefixes of parameters that read the input or write the output: Muon leaves them to AdamW."""


def alphas_cumprod() -> Tensor:
    """Return the cumulative alphas of Stable Diffusion 1.x's schedule: (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def sample_timesteps(count: int, device: torch.device) -> Tensor:
    """Draw timesteps: half uniform, half from the noisiest three quarters.

    The noisy ones decide composition, and follow the text.
    """
    u = torch.rand(count, device=device)
    is_noisy = torch.rand(count, device=device) < HIGH_NOISE_SHARE
    return torch.where(is_noisy, 250 + 750 * u, 1000 * u).long().clamp(0, 999)


def loss_weight(abar: Tensor) -> Tensor:
    """Return the emphasis on high noise: clamp(sigma, 1, 10)^1.3 times the plain epsilon error."""
    sigma = ((1 - abar) / abar).sqrt()
    return sigma.clamp(1, 10) ** 1.3


def empty_caption(vocabulary: int, length: int, device: torch.device) -> Tensor:
    """Return the token ids of the empty caption: start, then padding."""
    empty = torch.full((length,), vocabulary - 1, device=device)
    empty[0] = vocabulary - 2
    return empty


def main() -> None:
    """Train, with checkpoints; write diffusion.safetensors with each."""
    parser = training.argument_parser(__doc__, steps=20000, batch=32)
    parser.add_argument(
        "--decay-share", type=float, default=0.3, help="last share of the run with a falling rate"
    )
    args = parser.parse_args()
    device = training.start(args)
    torch.manual_seed(5)
    latents = load_file(args.work / "latents.safetensors")["latents"].to(device)
    described = load_file(args.work / "captions.safetensors")
    captions, vocabulary = described["captions"][: len(latents)].to(device), described["vocabulary"]
    if len(captions) < len(latents):
        parser.error(f"{len(latents)} scenes have latents, {len(captions)} have captions: prepare both")
    empty = empty_caption(len(vocabulary), captions.shape[-1], device)
    model = Diffusion(len(vocabulary)).to(device)
    training.log.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    run = training.Run(args.work / "diffusion.checkpoint", model, EDGES, ema_decay=0.999)
    if args.resume:
        run.resume()
    progress = training.Progress(50, args.batch)
    abar_of = alphas_cumprod().to(device)
    while run.step < args.steps:
        run.optimizer.set_scale(training.learning_rate_scale(run.step, args.steps, 100, args.decay_share))
        chosen = torch.randint(0, len(latents), (args.batch,), device=device)
        which = torch.randint(0, captions.shape[1], (args.batch,), device=device)
        tokens = captions[chosen, which].long()
        tokens[torch.rand(args.batch, device=device) < EMPTY_CAPTION_SHARE] = empty
        x0 = latents[chosen].float()
        timesteps = sample_timesteps(args.batch, device)
        abar = abar_of[timesteps][:, None, None, None]
        noise = torch.randn_like(x0)
        noise += OFFSET_NOISE * torch.randn(*x0.shape[:2], 1, 1, device=device)
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16):
            prediction = model(x, timesteps, tokens)
        loss = (loss_weight(abar) * (prediction.float() - noise).square()).mean()
        run.advance(loss)
        progress.update(run.step, loss)
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
            with training.atomic(args.work / "diffusion.safetensors") as temporary:
                save_file({**run.averaged(), "vocabulary": vocabulary}, temporary)


if __name__ == "__main__":
    main()
