"""A decoder that is one convolution, fitted to a VAE by least squares: coarse, nearly free, with a gradient without kinks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RIDGE = 1e-3
"""Share of the mean variance added to every direction of the fit, so that latents that do not vary in the samples count for nothing."""


class LinearDecoder(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, r h, r w): each r x r pixels from the 3 x 3 latents around them."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.convolution = nn.Conv2d(channels, 3 * ratio**2, 3, padding=1, padding_mode="replicate")

    def forward(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self.convolution(latents), self.ratio)


def fit(latents: Tensor, images: Tensor) -> LinearDecoder:
    """The linear decoder that comes closest to `images` (N, 3, H, W) from `latents` (N, C, h, w) in the mean square.

    Raises:
        ValueError: the images are not a whole multiple of the latents' size.
    """
    ratio, rest = divmod(images.shape[-1], latents.shape[-1])
    if rest or images.shape[-2] != ratio * latents.shape[-2]:
        raise ValueError(
            "The VAE's images are not a whole multiple of its latents. Choose the decoder 'vae'."
        )
    channels = latents.shape[1]
    around = F.unfold(F.pad(latents.double(), (1, 1, 1, 1), mode="replicate"), 3).movedim(1, 2).flatten(0, 1)
    wanted = F.pixel_unshuffle(images.double(), ratio).flatten(2).movedim(1, 2).flatten(0, 1)
    around_mean, wanted_mean = around.mean(0), wanted.mean(0)
    centred = around - around_mean
    covariance = centred.T @ centred / len(centred)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    weight = torch.linalg.solve(covariance, centred.T @ (wanted - wanted_mean) / len(centred))
    decoder = LinearDecoder(channels, ratio)
    with torch.no_grad():
        decoder.convolution.weight.copy_(weight.T.reshape(-1, channels, 3, 3))
        decoder.convolution.bias.copy_(wanted_mean - around_mean @ weight)  # type: ignore[union-attr]
    return decoder.requires_grad_(False).eval()


def sample_images(count: int, side: int) -> Tensor:
    """Images (count, 3, side, side) in [0, 1] to fit on: areas of colour with hard and soft edges, at all scales. Always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(count, 3, side, side)
    cells = 2
    while cells <= side // 2:
        colors = torch.rand(count, 3, cells, cells, generator=generator)
        shown = (torch.rand(count, 1, cells, cells, generator=generator) < 0.5).float()
        soft = F.interpolate(colors, (side, side), mode="bilinear", align_corners=False)
        hard = F.interpolate(colors, (side, side), mode="nearest")
        layer = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, soft, hard)
        images = torch.lerp(
            images, layer, F.interpolate(shown, (side, side), mode="nearest") * (2 / cells) ** 0.5
        )
        cells *= 2
    return images
