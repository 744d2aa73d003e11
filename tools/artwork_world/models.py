"""Networks of the artwork world's model: sizes, and trainable twins of the host's UNet and CLIP text model.

The twins have the host's state-dict keys. Their blocks are those of `tools/demo_model/networks.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import training  # noqa: F401  (puts the folder of the next import on the path)
from networks import (
    Downsample,
    ResBlock,
    SpatialTransformer,
    Stage,
    TextLayer,
    Upsample,
    timestep_embedding,
)

_demo = training.pack_module("demo.networks")
LATENT_CHANNELS: int = _demo.LATENT_CHANNELS
DOWNSCALE: int = _demo.DOWNSCALE
LATENT_SCALE: float = _demo.LATENT_SCALE

TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_LENGTH = 128, 3, 4, 77

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


class UNet(nn.Module):
    """Twin of the host's UNetModel for one residual block a level and UNET_CONFIG's options."""

    def __init__(self, config: dict[str, Any] = UNET_CONFIG) -> None:
        super().__init__()
        self.width = config["model_channels"]
        widths = [self.width * multiplier for multiplier in config["channel_mult"]]
        context, head_width = config["context_dim"], config["num_head_channels"]
        cross_only = config["disable_self_attentions"]
        embedding = self.width * 4

        def stage(inputs: int, level: int, attends: bool) -> list[nn.Module]:
            outputs = widths[level]
            layers: list[nn.Module] = [ResBlock(inputs, embedding, outputs)]
            if attends:
                layers.append(SpatialTransformer(outputs, outputs // head_width, context, cross_only[level]))
            return layers

        self.time_embed = nn.Sequential(
            nn.Linear(self.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config["in_channels"], self.width, 3, padding=1))])
        skips, channels = [self.width], self.width
        for level in range(len(widths)):
            attends = bool(config["transformer_depth"][level])
            self.input_blocks.append(Stage(*stage(channels, level, attends)))
            channels = widths[level]
            skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage(Downsample(channels)))
                skips.append(channels)
        self.middle_block = Stage(
            ResBlock(channels, embedding, channels),
            SpatialTransformer(channels, channels // head_width, context, False),
            ResBlock(channels, embedding, channels),
        )
        self.output_blocks = nn.ModuleList()
        # The host takes the transformers' depths of the output blocks from the end of the list.
        depths = list(config["transformer_depth_output"])
        for level in reversed(range(len(widths))):
            for i in range(2):
                layers = stage(channels + skips.pop(), level, bool(depths.pop()))
                channels = widths[level]
                if level and i == 1:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, config["out_channels"], 3, padding=1)
        )
        for parameter in self.out[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Predict the noise of (B, 4, h, w) latents, given timesteps (B,) and text (B, tokens, width)."""
        embedding = self.time_embed(timestep_embedding(timesteps, self.width))
        hidden = []
        for block in self.input_blocks:
            x = block(x, embedding, context)
            hidden.append(x)
        x = self.middle_block(x, embedding, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, hidden.pop()], dim=1), embedding, context)
        return self.out(x)


class TextEncoder(nn.Module):
    """Twin of the host's CLIP text model.

    Token ids are rows of the world's small vocabulary, not of CLIP's table.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(vocabulary, TEXT_WIDTH),
                "position_embedding": nn.Embedding(TEXT_LENGTH, TEXT_WIDTH),
            }
        )
        layers = nn.ModuleList(TextLayer(TEXT_WIDTH, TEXT_HEADS) for _ in range(TEXT_LAYERS))
        self.text_model = nn.ModuleDict(
            {
                "embeddings": embeddings,
                "encoder": nn.ModuleDict({"layers": layers}),
                "final_layer_norm": nn.LayerNorm(TEXT_WIDTH),
            }
        )
        nn.init.normal_(embeddings["token_embedding"].weight, std=0.3)
        nn.init.normal_(embeddings["position_embedding"].weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, tokens, width) text embeddings of (B, tokens) ids."""
        embeddings = self.text_model["embeddings"]
        x = embeddings["token_embedding"](tokens) + embeddings["position_embedding"].weight[: tokens.shape[1]]
        for layer in self.text_model["encoder"]["layers"]:
            x = layer(x)
        return self.text_model["final_layer_norm"](x)


class Diffusion(nn.Module):
    """UNet and text encoder, which are trained together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.unet, self.text = UNet(), TextEncoder(vocabulary)

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predict the noise of latents, given (B,) timesteps and (B, 77) token ids."""
        return self.unet(x, timesteps, self.text(tokens))
