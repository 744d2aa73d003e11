"""Train the demo model's autoencoder on drawn scenes and store the statistics that normalise its latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import common
import world

networks = common.pack_module("demo.networks")
CROP = 48


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """Sum L1, squared error, and L1 of the image's gradients, which keeps edges sharp."""
    difference = y - x
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges


def main() -> None:
    """Train the autoencoder and save it."""
    parser = common.argument_parser(__doc__, steps=2600, batch=32)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = torch.device(args.device)

    images = (world.render_batch(world.sample_scenes(2000, seed=1)) * 2 - 1).half().to(device)
    autoencoder = networks.Autoencoder().to(device)
    edges = (
        "encoder.0",
        f"encoder.{len(autoencoder.encoder) - 1}",
        "decoder.0",
        f"decoder.{len(autoencoder.decoder) - 1}",
    )
    optimizer = common.MuonAdamW(autoencoder.named_parameters(), edges)
    progress = common.Progress(100, args.batch)
    for step, scale in enumerate(common.schedule(args.steps, warmup=40, stable=0.4)):
        optimizer.set_scale(scale)
        top, left = torch.randint(0, world.SIZE - CROP + 1, (2,)).tolist()
        x = images[
            torch.randint(0, len(images), (args.batch,), device=device),
            :,
            top : top + CROP,
            left : left + CROP,
        ].float()
        with torch.autocast(device.type, torch.bfloat16):
            z = autoencoder.encoder(F.pixel_unshuffle(x, networks.DOWNSCALE)).float()
            noisy = z + 0.03 * torch.randn_like(z)
            y = F.pixel_shuffle(autoencoder.decoder(noisy), networks.DOWNSCALE).float()
        unit_variance = (z.square().mean((0, 2, 3)) - 1).square().mean()
        loss = reconstruction_loss(y, x) + 0.01 * unit_variance
        optimizer.step(loss)
        progress.update(step, loss)

    autoencoder.requires_grad_(False).eval()
    z = torch.cat(
        [autoencoder.encoder(F.pixel_unshuffle(x.float(), networks.DOWNSCALE)) for x in images.split(100)]
    )
    autoencoder.mean.copy_(z.mean((0, 2, 3), keepdim=True))
    autoencoder.std.copy_(z.std((0, 2, 3), keepdim=True))
    held_out = (world.render_batch(world.sample_scenes(100, seed=2)) * 2 - 1).to(device)
    error = (autoencoder.decode(autoencoder.encode(held_out)) - held_out).square().mean()
    common.log.info("held-out reconstruction: %.2f dB", 10 * torch.log10(4 / error))
    save_file(
        {k: v.cpu().contiguous() for k, v in autoencoder.state_dict().items()},
        args.work / "autoencoder.safetensors",
    )


if __name__ == "__main__":
    main()
