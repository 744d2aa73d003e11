"""Pack the trained parts of the demo model and its configuration into one half-precision file."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import common
import world
from networks import TEXT_HEADS, TEXT_LAYERS, TEXT_WIDTH, UNET_CONFIG

networks = common.pack_module("demo.networks")


def preview_factors(autoencoder: nn.Module) -> tuple[list[list[float]], list[float]]:
    """Fit the linear map from latent channels (model space) to RGB in [-1, 1] for fast previews."""
    images = world.render_batch(world.sample_scenes(200, seed=3)) * 2 - 1
    latents = autoencoder.encode(images) * networks.LATENT_SCALE
    small = F.interpolate(images, size=latents.shape[-2:], mode="area")
    z: Tensor = latents.movedim(1, -1).flatten(0, 2)
    rgb: Tensor = small.movedim(1, -1).flatten(0, 2)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], dim=1), rgb).solution
    factors, bias = solution[:-1], solution[-1]
    return factors.tolist(), bias.tolist()


def main() -> None:
    """Write the packed file."""
    args = common.argument_parser(__doc__, steps=0, batch=0).parse_args()
    autoencoder = networks.Autoencoder().requires_grad_(False)
    autoencoder.load_state_dict(load_file(args.work / "autoencoder.safetensors"))
    diffusion = load_file(args.work / "diffusion.safetensors")
    vocabulary = diffusion.pop("vocabulary")
    tensors = {name: tensor.half() for name, tensor in diffusion.items()}
    tensors |= {f"vae.{name}": tensor.half() for name, tensor in autoencoder.state_dict().items()}
    factors, bias = preview_factors(autoencoder)
    metadata = {
        "format": networks.FORMAT,
        "unet": json.dumps(UNET_CONFIG),
        "text": json.dumps({"width": TEXT_WIDTH, "layers": TEXT_LAYERS, "heads": TEXT_HEADS}),
        "preview": json.dumps({"factors": factors, "bias": bias}),
    }
    path = common.ASSETS / "demo_model" / "demo_model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, "vocabulary": vocabulary.int()}, path, metadata=metadata)
    common.log.info("%s: %.2f MB", path.name, path.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
