"""Networks of the bundled demo model for which the host has no class.

The module needs only torch, so that the training tools can use it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMAT = "safe-guidance demo model 1"
"""Names the layout of the weights file."""

LATENT_CHANNELS = 4
DOWNSCALE = 4
LATENT_SCALE = 0.18215
"""Stable Diffusion 1.x's latent scale factor: the host multiplies encoded latents by it."""


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), the second convolution starting at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Autoencoder(nn.Module):
    """Deterministic autoencoder (B, 3, 4h, 4w) in [-1, 1] <-> (B, 4, h, w).

    It has the interface of the host's first-stage models. All convolutions run at latent resolution,
    between a pixel unshuffle and a pixel shuffle, which makes it fast on a CPU. Latents are normalised with
    the stored statistics to a standard deviation of 0.5 in the model's space. At 1.0 the mean of an image
    would stay visible in the noise of the schedule's last step, and the seed would choose the background.
    """

    LATENT_STD = 0.5

    def __init__(
        self,
        encoder_channels: int = 64,
        decoder_channels: int = 96,
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
    ) -> None:
        super().__init__()
        pixels = 3 * DOWNSCALE**2
        self.encoder = nn.Sequential(
            nn.Conv2d(pixels, encoder_channels, 3, padding=1),
            *(ResidualBlock(encoder_channels) for _ in range(encoder_blocks)),
            nn.Conv2d(encoder_channels, LATENT_CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, decoder_channels, 3, padding=1),
            *(ResidualBlock(decoder_channels) for _ in range(decoder_blocks)),
            nn.Conv2d(decoder_channels, pixels, 3, padding=1),
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(1, LATENT_CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(1, LATENT_CHANNELS, 1, 1))

    def encode(self, x: Tensor) -> Tensor:
        z = self.encoder(F.pixel_unshuffle(x, DOWNSCALE))
        return (z - self.mean) / self.std * (self.LATENT_STD / LATENT_SCALE)

    def decode(self, z: Tensor) -> Tensor:
        z = z * (LATENT_SCALE / self.LATENT_STD) * self.std + self.mean
        return F.pixel_shuffle(self.decoder(z), DOWNSCALE)
