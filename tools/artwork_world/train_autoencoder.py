"""Train the artwork world's autoencoder on drawn scenes.

The last step stores the statistics that normalise its latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import training
from models import DOWNSCALE, make_autoencoder

world = training.pack_module("demo.artwork_world")
renderer = training.pack_module("demo.artwork_renderer")

SCENES = 3000
HELD_OUT = 200
CROP = 48
LATENT_NOISE = 0.04
"""Standard deviation of the noise on latents in training, so that the decoder forgives small errors."""


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """Return L1, squared error, and L1 of the image's gradients, which keeps edges sharp."""
    difference = y - x
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges


def random_crops(images: Tensor, count: int) -> Tensor:
    """Cut the same window out of `count` random images: (count, 3, CROP, CROP) in [-1, 1]."""
    top, left = torch.randint(0, images.shape[-1] - CROP + 1, (2,)).tolist()
    chosen = torch.randint(0, len(images), (count,)).to(images.device)
    return images[chosen, :, top : top + CROP, left : left + CROP].float() / 127.5 - 1


def psnr(y: Tensor, x: Tensor) -> float:
    """Return the mean over images of the peak signal-to-noise ratio in dB, for values in [-1, 1]."""
    error = (y.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def finish(autoencoder: nn.Module, images: Tensor) -> nn.Module:
    """Store the mean and the standard deviation of the latents of some images in [0, 255]."""
    z = torch.cat(
        [autoencoder.encoder(F.pixel_unshuffle(x.float() / 127.5 - 1, DOWNSCALE)) for x in images.split(50)]
    )
    autoencoder.mean.copy_(z.mean((0, 2, 3), keepdim=True))
    autoencoder.std.copy_(z.std((0, 2, 3), keepdim=True))
    return autoencoder


def main() -> None:
    """Train, measure held-out scenes, and write autoencoder.safetensors."""
    args = training.argument_parser(__doc__, steps=3000, batch=32).parse_args()
    device = training.start(args)
    torch.manual_seed(0)
    artwork = training.load_artwork(args.work, device)

    def draw(count: int, seed: int) -> Tensor:
        scenes = world.sample_scenes(count, world.SEEDS[seed])
        return torch.stack(
            [(renderer.render(s, artwork).image * 255).round().to(torch.uint8) for s in scenes]
        )

    images = draw(SCENES, "training")
    autoencoder = make_autoencoder().to(device)
    edges = tuple(
        f"{part}.{i}." for part in ("encoder", "decoder") for i in (0, len(getattr(autoencoder, part)) - 1)
    )
    run = training.Run(args.work / "autoencoder.checkpoint", autoencoder, edges, ema_decay=0.995)
    if args.resume:
        run.resume()
    progress = training.Progress(50, args.batch)
    while run.step < args.steps:
        run.optimizer.set_scale(
            training.learning_rate_scale(run.step, args.steps, warmup=40, decay_share=0.6)
        )
        x = random_crops(images, args.batch)
        with torch.autocast(device.type, torch.bfloat16):
            z = autoencoder.encoder(F.pixel_unshuffle(x, DOWNSCALE)).float()
            noisy = z + LATENT_NOISE * torch.randn_like(z)
            y = F.pixel_shuffle(autoencoder.decoder(noisy), DOWNSCALE).float()
        unit_variance = (z.square().mean((0, 2, 3)) - 1).square().mean()
        loss = reconstruction_loss(y, x) + 0.01 * unit_variance
        run.advance(loss)
        progress.update(run.step, loss)
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()

    final = make_autoencoder().to(device).requires_grad_(False).eval()
    final.load_state_dict(run.averaged(), strict=False)
    finish(final, images[:1000])
    held_out = draw(HELD_OUT, "reconstruction").float() / 127.5 - 1
    with torch.no_grad():
        decoded = torch.cat([final.decode(final.encode(x)) for x in held_out.split(50)])
    training.log.info("held-out reconstruction: %.2f dB", psnr(decoded, held_out))
    with training.atomic(args.work / "autoencoder.safetensors") as temporary:
        save_file({k: v.cpu().contiguous() for k, v in final.state_dict().items()}, temporary)


if __name__ == "__main__":
    main()
