"""Linear decoder: one convolution, fitted to a VAE by least squares.

It is coarse and fast, and its gradient is smooth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RIDGE = 1e-3
"""Ridge term of the fit, as a share of the mean variance.

Directions in which the latents do not vary get zero weight.
"""


class LinearDecoder(nn.Module):
    """Decodes latents (B, C, h, w) to images (B, 3, r h, r w).

    Each r x r pixels depend on the 3 x 3 latents around them.

    Args:
        channels: C.
        ratio: r.
    """

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.convolution = nn.Conv2d(channels, 3 * ratio**2, 3, padding=1, padding_mode="replicate")

    def forward(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, r h, r w) of latents (B, C, h, w)."""
        return F.pixel_shuffle(self.convolution(latents), self.ratio)


def fit_linear_decoder(latents: Tensor, images: Tensor) -> LinearDecoder:
    """Fit a linear decoder to pairs of latents (N, C, h, w) and images (N, 3, H, W) by least squares.

    Raises:
        ValueError: the size of the images is not a whole multiple of the size of the latents.
    """
    ratio, rest = divmod(images.shape[-1], latents.shape[-1])
    if rest or images.shape[-2] != ratio * latents.shape[-2]:
        raise ValueError(
            "The size of the VAE's images is not a whole multiple of the size of its latents. "
            "Choose the decoder 'vae'."
        )
    channels = latents.shape[1]
    padded = F.pad(latents.double(), (1, 1, 1, 1), mode="replicate")
    around = F.unfold(padded, 3).movedim(1, 2).flatten(0, 1)  # (N h w, 9 C)
    squares = F.pixel_unshuffle(images.double(), ratio)  # (N, 3 r r, h, w)
    wanted = squares.flatten(2).movedim(1, 2).flatten(0, 1)  # (N h w, 3 r r)
    around_mean = around.mean(0)
    wanted_mean = wanted.mean(0)
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
    """Generate images (count, 3, side, side) in [0, 1] to fit on.

    They show areas of colour with hard and soft edges at all scales.

    The images are the same at every call.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(count, 3, side, side)
    cells = 2
    while cells <= side // 2:
        colors = torch.rand(count, 3, cells, cells, generator=generator)
        shown = (torch.rand(count, 1, cells, cells, generator=generator) < 0.5).float()
        soft = F.interpolate(colors, (side, side), mode="bilinear", align_corners=False)
        hard = F.interpolate(colors, (side, side), mode="nearest")
        layer = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, soft, hard)
        opacity = F.interpolate(shown, (side, side), mode="nearest") * (2 / cells) ** 0.5
        images = torch.lerp(images, layer, opacity)
        cells *= 2
    return images
