"""Trainable copies of the host's UNet and CLIP text model, with the same mathematics and state-dict keys.

The host's classes leave their weights uninitialised and frozen, and are slower on a CPU. `check_parity.py`
compares both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 3],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [1, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "context_dim": 96,
    "disable_self_attentions": [True, False, False],
}
"""Arguments of the host's UNetModel.

Without self-attention (full resolution), attn1 is a second cross-attention.
"""

LATENT_CHANNELS = 4
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_LENGTH = 96, 2, 4, 77


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Embed timesteps (B,) by cosines and sines: (B, width)."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute scaled dot-product attention of (B, heads, tokens, width).

    Plain products are faster for short rows on a CPU.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1)
    return weights.to(v.dtype) @ v


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, run as a matrix product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        assert self.bias is not None
        return (torch.matmul(self.weight.view(-1, c), x.flatten(2)) + self.bias[:, None]).view(b, -1, h, w)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, embedding: int, outputs: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Identity(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else PointwiseConv(inputs, outputs)
        for parameter in self.out_layers[3].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x)
        h = h + self.emb_layers(embedding)[..., None, None].to(h.dtype)
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, query: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query, query, bias=False)
        self.to_k = nn.Linear(context, query, bias=False)
        self.to_v = nn.Linear(context, query, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query, query), nn.Identity())

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, n, width = x.shape
        q = self._split_heads(self.to_q(x))
        k = self._split_heads(self.to_k(context))
        v = self._split_heads(self.to_v(context))
        return self.to_out(attention(q, k, v).transpose(1, 2).reshape(b, n, width))

    def _split_heads(self, x: Tensor) -> Tensor:
        # (B, tokens, width) -> (B, heads, tokens, width / heads)
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.proj(x).chunk(2, dim=-1)
        return values * F.gelu(gates)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, context: int, cross_only: bool) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = Attention(width, context if cross_only else width, heads)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, context if self.cross_only else n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, heads: int, context: int, cross_only: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = PointwiseConv(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context, cross_only)])
        self.proj_out = PointwiseConv(channels, channels)
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Sequential):
    """A UNet block. Each layer gets those of x, timestep embedding and context that it uses."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Copy of the host's UNetModel for one residual block per level and the options of UNET_CONFIG.

    Args:
        config: arguments of the host's UNetModel, the demo model's or another model's.
    """

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
        """Predict the noise of x (B, 4, h, w) at DDPM timesteps (B,) with text context (B, T, width)."""
        embedding = self.time_embed(timestep_embedding(timesteps, self.width))
        hidden = []
        for block in self.input_blocks:
            x = block(x, embedding, context)
            hidden.append(x)
        x = self.middle_block(x, embedding, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, hidden.pop()], dim=1), embedding, context)
        return self.out(x)


class TextLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        h = self.layer_norm1(x)
        # (B, heads, tokens, width / heads) each
        q = self.self_attn["q_proj"](h).view(b, n, self.heads, -1).transpose(1, 2)
        k = self.self_attn["k_proj"](h).view(b, n, self.heads, -1).transpose(1, 2)
        v = self.self_attn["v_proj"](h).view(b, n, self.heads, -1).transpose(1, 2)
        scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(causal, float("-inf")).softmax(-1).to(v.dtype)
        x = x + self.self_attn["out_proj"]((weights @ v).transpose(1, 2).reshape(b, n, width))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))


class TextEncoder(nn.Module):
    """Copy of the host's CLIP text model, of the demo model's size unless told otherwise.

    Token ids are rows of the world's vocabulary, not of CLIP's table.
    """

    def __init__(
        self, vocabulary: int, width: int = TEXT_WIDTH, layers: int = TEXT_LAYERS, heads: int = TEXT_HEADS
    ) -> None:
        super().__init__()
        embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(vocabulary, width),
                "position_embedding": nn.Embedding(TEXT_LENGTH, width),
            }
        )
        encoder = nn.ModuleDict({"layers": nn.ModuleList(TextLayer(width, heads) for _ in range(layers))})
        self.text_model = nn.ModuleDict(
            {"embeddings": embeddings, "encoder": encoder, "final_layer_norm": nn.LayerNorm(width)}
        )
        nn.init.normal_(embeddings["token_embedding"].weight, std=0.3)
        nn.init.normal_(embeddings["position_embedding"].weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return text embeddings (B, T, width) of token ids (B, T)."""
        embeddings = self.text_model["embeddings"]
        x = embeddings["token_embedding"](tokens) + embeddings["position_embedding"].weight[: tokens.shape[1]]
        for layer in self.text_model["encoder"]["layers"]:
            x = layer(x)
        return self.text_model["final_layer_norm"](x)
