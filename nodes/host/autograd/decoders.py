"""Differentiable decoders from a prediction in the model's latent space to an image for a safety function."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import comfy.model_management
import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....guidance.safety_functions.linear_decoder import fit_linear_decoder, sample_images
from ..engine.frames import image_latents, images_in, images_out
from .auxiliary_models import auxiliary_patcher
from .ordinary_tensors import ordinary

DecoderName = Literal["vae", "taesd", "linear"]
DECODERS: tuple[DecoderName, ...] = ("vae", "taesd", "linear")


class Decoder(ABC):
    """Decodes latents (B, C, h, w) in the model's own space to images (B, 3, H, W).

    Their values are about in [0, 1] and not clamped.
    """

    networks: Sequence[nn.Module] = ()
    """All modules with weights."""
    patchers: Sequence[ModelPatcher] = ()
    """Models that the host must load together with the sampled model."""

    def __init__(self, latent_format: Any) -> None:
        self.latent_format = latent_format

    @abstractmethod
    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) on the decoder's device."""


class VaeDecoder(Decoder):
    """The VAE itself, which gives the most accurate images."""

    def __init__(self, latent_format: Any, vae: Any) -> None:
        super().__init__(latent_format)
        self.vae, self.networks, self.patchers = vae, [vae.first_stage_model], [vae.patcher]
        # The host's own conversion to [0, 1] also clamps, which would stop gradients. Use the linear part.
        low = float(vae.process_output(torch.tensor([0.0])))
        high = float(vae.process_output(torch.tensor([0.5])))
        self.offset, self.slope = low, 2 * (high - low)

    def __call__(self, latents: Tensor) -> Tensor:
        vae = self.vae
        scaled = images_out(self.latent_format, latents).to(vae.device, vae.vae_dtype)
        if vae.latent_dim == 2:
            decoded = vae.first_stage_model.decode(scaled)
        else:
            decoded = vae.first_stage_model.decode(scaled[:, :, None])[:, :, 0]
        return decoded.float() * self.slope + self.offset


class NetworkDecoder(Decoder):
    """A small network that decodes latents in the model's own space."""

    def __init__(self, latent_format: Any, network: nn.Module) -> None:
        super().__init__(latent_format)
        self.network, self.networks, self.patchers = network, [network], [auxiliary_patcher(network)]

    def __call__(self, latents: Tensor) -> Tensor:
        device = comfy.model_management.get_torch_device()
        return self.network(latents.to(device, torch.float32))  # type: ignore[no-any-return]


class TinyAutoencoder(nn.Module):
    """The decoder of the host's tiny autoencoder for previews (TAESD)."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Return images, about in [0, 1], of latents in the model's own space."""
        return self.autoencoder.decode(latents) / 2 + 0.5  # type: ignore[no-any-return]


class TinyVideoAutoencoder(nn.Module):
    """The decoder of the host's tiny video autoencoder for previews (TAEHV), for single images."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Return images, about in [0, 1], of latents in the model's own space."""
        return self.autoencoder.decode(latents[:, :, None])[:, :, 0]  # type: ignore[no-any-return]


def taesd_decoder(latent_format: Any) -> Decoder:
    """Return the decoder of the host's tiny autoencoder.

    Raises:
        FileNotFoundError: its file is missing; the message says where it belongs.
    """
    name = latent_format.taesd_decoder_name
    if name is None:
        raise FileNotFoundError(
            "The fast decoder 'taesd' does not exist for this model. Choose the decoder 'linear'."
        )
    files = [f for f in folder_paths.get_filename_list("vae_approx") if f.startswith(f"{name}.")]
    if not files:
        raise FileNotFoundError(
            f"The file of the fast decoder 'taesd' is missing. "
            f"Put {name}.safetensors into models/vae_approx, or choose the decoder 'linear'."
        )
    path = folder_paths.get_full_path("vae_approx", files[0])
    with torch.inference_mode(False):
        if latent_format.latent_dimensions == 3:
            weights = comfy.utils.load_torch_file(path, safe_load=True)
            autoencoder = comfy.sd.VAE(sd=weights).first_stage_model.float()
            return NetworkDecoder(latent_format, TinyVideoAutoencoder(autoencoder))
        autoencoder = comfy.taesd.taesd.TAESD(None, path, latent_channels=latent_format.latent_channels)
        return NetworkDecoder(latent_format, TinyAutoencoder(autoencoder))


FITTED_IMAGES, FITTED_SIDE = 8, 32
"""Number of images on which a linear decoder is fitted, and the side of their latents."""

# One decoder per VAE, which lives as long as the VAE's network.
_fitted: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def fitted_decoder(latent_format: Any, vae: Any) -> Decoder:
    """Return the linear decoder of a VAE, which is fitted when the VAE is first used."""
    if vae.first_stage_model not in _fitted:
        images = sample_images(FITTED_IMAGES, FITTED_SIDE * vae.spacial_compression_encode())
        latents = image_latents(images.movedim(1, -1), vae).float().cpu()
        with torch.inference_mode(False):
            scaled = ordinary(images_in(latent_format, latents))
            _fitted[vae.first_stage_model] = fit_linear_decoder(scaled, images)
    return NetworkDecoder(latent_format, _fitted[vae.first_stage_model])


def make_decoder(name: DecoderName, model: ModelPatcher, vae: Any) -> Decoder:
    """Make a decoder for a model.

    Args:
        name: of the decoder.
        model: whose latents are decoded.
        vae: the model's VAE.

    Raises:
        FileNotFoundError: the fast decoder's file is missing.
        ValueError: the VAE does not belong to the model.
    """
    latent_format = model.get_model_object("latent_format")
    if vae.latent_channels != latent_format.latent_channels:
        raise ValueError(
            f"The VAE decodes latents with {vae.latent_channels} channels, "
            f"the model samples {latent_format.latent_channels}. Connect the VAE that belongs to the model."
        )
    if name == "taesd":
        return taesd_decoder(latent_format)
    if name == "linear":
        return fitted_decoder(latent_format, vae)
    return VaeDecoder(latent_format, vae)
