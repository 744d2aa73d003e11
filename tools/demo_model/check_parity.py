"""Compare the training networks with the host's, given the same weights.

Run it with the host's folder on PYTHONPATH.
"""

from __future__ import annotations

import sys

import torch

import common
from networks import UNET_CONFIG, UNet


@torch.no_grad()
def main() -> None:
    """Log the largest relative difference of the UNets."""
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.ldm.modules.diffusionmodules.openaimodel as host
    import comfy.ops

    torch.manual_seed(0)
    ours = UNet()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = {name: list(value) if isinstance(value, list) else value for name, value in UNET_CONFIG.items()}
    theirs = host.UNetModel(**config, legacy=False, operations=comfy.ops.disable_weight_init)
    theirs.load_state_dict(ours.state_dict())
    x, timesteps, context = torch.randn(2, 4, 32, 32), torch.tensor([10, 900]), torch.randn(2, 77, 96)
    expected = theirs(x, timesteps, context=context)
    difference = (ours(x, timesteps, context) - expected).abs().max() / expected.abs().max()
    common.log.warning("largest relative difference of the UNets: %.1e", difference)


if __name__ == "__main__":
    main()
