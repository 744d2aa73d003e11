"""Compare the training networks with the host's own, given the same weights.

Run it with the host's folder on PYTHONPATH.
"""

from __future__ import annotations

import sys

import torch

import training
from models import TEXT_HEADS, TEXT_LAYERS, TEXT_WIDTH, UNET_CONFIG
from networks import TEXT_LENGTH, TextEncoder, UNet

VOCABULARY = 49408
"""Rows of CLIP's token table, which the host's class always has."""


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest absolute difference relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def main() -> None:
    """Log the largest relative difference of the UNets' and of the text encoders' outputs."""
    args = training.argument_parser(__doc__, steps=0, batch=0).parse_args()
    training.start(args)
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.clip_model
    import comfy.ldm.modules.diffusionmodules.openaimodel as host
    import comfy.ops

    torch.manual_seed(0)
    operations = comfy.ops.disable_weight_init
    unet = UNet(UNET_CONFIG)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = {name: list(value) if isinstance(value, list) else value for name, value in UNET_CONFIG.items()}
    host_unet = host.UNetModel(**config, legacy=False, operations=operations)
    host_unet.load_state_dict(unet.state_dict())
    x, timesteps = torch.randn(2, 4, 32, 32), torch.tensor([10, 900])
    context = torch.randn(2, TEXT_LENGTH, TEXT_WIDTH)
    theirs = host_unet(x, timesteps, context=context)
    training.log.info("UNet: %.1e", largest_difference(unet(x, timesteps, context), theirs))

    text = TextEncoder(VOCABULARY, TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS)
    host_text = comfy.clip_model.CLIPTextModel(
        {
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 4 * TEXT_WIDTH,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": TEXT_HEADS,
            "max_position_embeddings": TEXT_LENGTH,
            "projection_dim": TEXT_WIDTH,
            "vocab_size": VOCABULARY,
            "eos_token_id": VOCABULARY - 1,
            "hidden_act": "quick_gelu",
        },
        dtype=torch.float32,
        device="cpu",
        operations=operations,
    )
    host_text.load_state_dict({**text.state_dict(), "text_projection.weight": torch.eye(TEXT_WIDTH)})
    tokens = torch.randint(0, VOCABULARY - 1, (2, TEXT_LENGTH))
    theirs = host_text(tokens)[0]
    training.log.info("text encoder: %.1e", largest_difference(text(tokens), theirs))


if __name__ == "__main__":
    main()
