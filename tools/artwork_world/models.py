"""Networks of the artwork world's model: sizes of the networks in `tools/demo_model/networks.py`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import training  # noqa: F401  (puts the folder of the next import on the path)
from networks import TextEncoder, UNet

_demo = training.pack_module("demo.networks")
LATENT_CHANNELS: int = _demo.LATENT_CHANNELS
DOWNSCALE: int = _demo.DOWNSCALE
LATENT_SCALE: float = _demo.LATENT_SCALE

TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 3, 4

UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [1, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "context_dim": TEXT_WIDTH,
    "disable_self_attentions": [True, False, False],
}
"""Arguments of the host's UNetModel.

Where self-attention is disabled (full resolution), attn1 is a second cross-attention. The host's last
convolution takes `model_channels` channels, so the first multiplier has to be 1.
"""


def make_autoencoder() -> nn.Module:
    """Return a new autoencoder of this world's size."""
    return _demo.Autoencoder(encoder_channels=64, decoder_channels=128, encoder_blocks=2, decoder_blocks=4)


class Diffusion(nn.Module):
    """UNet and text encoder, which are trained together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.unet = UNet(UNET_CONFIG)
        self.text = TextEncoder(vocabulary, TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS)

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predict the noise of latents, given (B,) timesteps and (B, 77) token ids."""
        return self.unet(x, timesteps, self.text(tokens))
