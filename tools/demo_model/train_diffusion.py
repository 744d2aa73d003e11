"""Train the demo model's text encoder and UNet together, by epsilon prediction on SD 1.x's noise schedule."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import common
from networks import TextEncoder, UNet

EMPTY_CAPTION_SHARE = 0.1
HIGH_NOISE_SHARE = 0.5
OFFSET_NOISE = 0.1
"""Standard deviation of a constant added to each noise channel, which hides the image's mean from the
model."""


def alphas_cumprod() -> Tensor:
    """Return Stable Diffusion 1.x's noise schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def sample_timesteps(count: int) -> Tensor:
    """Sample half uniformly and half from the noisiest three quarters, which decide the composition."""
    u = torch.rand(count)
    noisy = torch.rand(count) < HIGH_NOISE_SHARE
    return torch.where(noisy, 250 + 750 * u, 1000 * u).long().clamp(0, 999)


def noise_like(x: Tensor) -> Tensor:
    """Sample noise with a random offset of each channel."""
    return torch.randn_like(x) + OFFSET_NOISE * torch.randn(*x.shape[:2], 1, 1, device=x.device)


def loss_weight(abar: Tensor) -> Tensor:
    """Weight the epsilon error by clamp(sigma, 1, 10)^1.3, which emphasises high noise."""
    sigma = ((1 - abar) / abar).sqrt()
    return sigma.clamp(1, 10) ** 1.3


def save(path: Path, unet: nn.Module, text: nn.Module, average: common.Average, vocabulary: Tensor) -> None:
    """Save the averaged parameters of both networks."""
    names = [f"unet.{n}" for n, _ in unet.named_parameters()] + [
        f"text.{n}" for n, _ in text.named_parameters()
    ]
    tensors = {name: value.cpu().contiguous() for name, value in zip(names, average.values)}
    save_file({**tensors, "vocabulary": vocabulary.cpu()}, path)


def main() -> None:
    """Train both networks and save them."""
    parser = common.argument_parser(__doc__, steps=2800, batch=64)
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(5)
    device = torch.device(args.device)
    data = {name: tensor.to(device) for name, tensor in load_file(args.work / "data.safetensors").items()}
    latents, captions, vocabulary = data["latents"], data["captions"], data["vocabulary"]
    empty = torch.full((captions.shape[-1],), len(vocabulary) - 1, device=device)
    empty[0] = len(vocabulary) - 2

    unet, text = UNet().to(device), TextEncoder(len(vocabulary)).to(device)
    named = [*unet.named_parameters(), *text.named_parameters()]
    optimizer = common.MuonAdamW(named, ("input_blocks.0", "out.", "text_model.embeddings"))
    average = common.Average(optimizer.parameters, decay=0.998)
    progress = common.Progress(50, args.batch)
    abar_of = alphas_cumprod().to(device)
    for step, scale in enumerate(common.schedule(args.steps, warmup=20, stable=0.3)):
        optimizer.set_scale(scale)
        chosen = torch.randint(0, len(latents), (args.batch,), device=device)
        tokens = captions[chosen, torch.randint(0, captions.shape[1], (args.batch,), device=device)].long()
        tokens[torch.rand(args.batch, device=device) < EMPTY_CAPTION_SHARE] = empty
        x0 = latents[chosen].float()
        timesteps = sample_timesteps(args.batch).to(device)
        abar = abar_of[timesteps][:, None, None, None]
        noise = noise_like(x0)
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16):
            prediction = unet(x, timesteps, text(tokens))
        loss = (loss_weight(abar) * (prediction.float() - noise).square()).mean()
        optimizer.step(loss)
        average.update()
        progress.update(step, loss)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.work / "diffusion.safetensors", unet, text, average, vocabulary)


if __name__ == "__main__":
    main()
