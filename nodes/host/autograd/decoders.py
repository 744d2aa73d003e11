"""Ways from a prediction in the model's latent space to an image that a safety function can look at, with gradients."""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import comfy.model_management
import comfy.taesd.taesd
import folder_paths
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from torch import Tensor, nn

from ....guidance.safety_functions.interface import Assessment, SafetyFunction
from ....guidance.safety_functions.linear_decoder import fit, sample_images
from .differentiable_layers import differentiable, ordinary, ordinary_attributes

DecoderName = Literal["vae", "taesd", "linear"]
_PATCHER = "_safe_guidance_patcher"
DECODERS: tuple[DecoderName, ...] = ("vae", "taesd", "linear")


class Decoder(ABC):
    """Makes images (B, 3, H, W), about in [0, 1] but not clamped, of latents (B, C, h, w) in the model's own space."""

    networks: Sequence[nn.Module] = ()
    patchers: Sequence[ModelPatcher] = ()
    """What the host must load along with the sampled model."""

    def __init__(self, latent_format: Any) -> None:
        self.latent_format = latent_format

    @abstractmethod
    def __call__(self, latents: Tensor) -> Tensor: ...


class VaeDecoder(Decoder):
    """The whole VAE: what the finished image would look like."""

    def __init__(self, latent_format: Any, vae: Any) -> None:
        super().__init__(latent_format)
        self.vae, self.networks, self.patchers = vae, [vae.first_stage_model], [vae.patcher]
        # The host's own way to [0, 1] also clamps, which would cut off gradients; only its straight part is wanted.
        low, high = (float(vae.process_output(torch.tensor([value]))) for value in (0.0, 0.5))
        self.offset, self.slope = low, 2 * (high - low)

    def __call__(self, latents: Tensor) -> Tensor:
        vae = self.vae
        decoded = vae.first_stage_model.decode(
            self.latent_format.process_out(latents).to(vae.device, vae.vae_dtype)
        )
        return decoded.float() * self.slope + self.offset


class NetworkDecoder(Decoder):
    """A network of this pack or of the host that decodes latents in the model's own space."""

    def __init__(self, latent_format: Any, network: nn.Module) -> None:
        super().__init__(latent_format)
        self.network, self.networks, self.patchers = network, [network], [auxiliary_patcher(network)]

    def __call__(self, latents: Tensor) -> Tensor:
        return self.network(latents.to(comfy.model_management.get_torch_device(), torch.float32))  # type: ignore[no-any-return]


class TinyAutoencoder(nn.Module):
    """The decoding half of the host's tiny autoencoder for previews."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Images about in [0, 1] of latents in the model's own space."""
        return self.autoencoder.decode(latents) / 2 + 0.5  # type: ignore[no-any-return]


def taesd_decoder(latent_format: Any) -> Decoder:
    """The host's tiny autoencoder, if its file is there.

    Raises:
        FileNotFoundError: it is not; the message says where it belongs.
    """
    name = latent_format.taesd_decoder_name
    files = (
        []
        if name is None
        else [f for f in folder_paths.get_filename_list("vae_approx") if f.startswith(f"{name}.")]
    )
    if not files:
        where = f"Put {name}.safetensors into models/vae_approx" if name else "None exists for this model"
        raise FileNotFoundError(
            f"The fast decoder 'taesd' is not there. {where}, or choose the decoder 'linear'."
        )
    path = folder_paths.get_full_path("vae_approx", files[0])
    with torch.inference_mode(False):
        autoencoder = comfy.taesd.taesd.TAESD(None, path, latent_channels=latent_format.latent_channels)
        return NetworkDecoder(latent_format, TinyAutoencoder(autoencoder))


FITTED_IMAGES, FITTED_SIDE = 8, 32
"""Number of images that a linear decoder is fitted on, and the side of their latents."""

_fitted: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def fitted_decoder(latent_format: Any, vae: Any) -> Decoder:
    """One convolution, fitted once to each VAE on images of its own making."""
    if vae.first_stage_model not in _fitted:
        images = sample_images(FITTED_IMAGES, FITTED_SIDE * vae.spacial_compression_encode())
        latents = vae.encode(images.movedim(1, -1)).float().cpu()
        with torch.inference_mode(False):
            _fitted[vae.first_stage_model] = fit(ordinary(latent_format.process_in(latents)), images)
    return NetworkDecoder(latent_format, _fitted[vae.first_stage_model])


def make_decoder(name: DecoderName, model: ModelPatcher, vae: Any) -> Decoder:
    """The decoder of that name for a model.

    Raises:
        FileNotFoundError: the fast decoder's file is missing.
        ValueError: the VAE is not the model's.
    """
    latent_format = model.get_model_object("latent_format")
    if vae.latent_channels != latent_format.latent_channels:
        raise ValueError(
            f"The VAE decodes latents with {vae.latent_channels} channels, the model samples {latent_format.latent_channels}. "
            "Connect the VAE that belongs to the model."
        )
    if name == "taesd":
        return taesd_decoder(latent_format)
    if name == "linear":
        return fitted_decoder(latent_format, vae)
    return VaeDecoder(latent_format, vae)


def auxiliary_patcher(network: nn.Module) -> ModelPatcher:
    """A network of this pack as the host's memory management wants it, to be loaded along with a sampled model.

    There is one for each network, kept with it: the host reports a network that outlives its patcher as a leak.
    """
    patcher: ModelPatcher | None = vars(network).get(_PATCHER)
    if patcher is None:
        patcher = CoreModelPatcher(
            network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        # The host makes such clones for further devices.
        patcher.cached_patcher_init = (lambda disable_dynamic=False: auxiliary_patcher(network), ())
        vars(network)[_PATCHER] = patcher
    return patcher


def assess(decoder: Decoder, function: SafetyFunction, latents: Tensor) -> Assessment:
    """What a safety function says about predictions, without a graph."""
    return function(decoder(latents))


def prediction_gradient(decoder: Decoder, function: SafetyFunction, latents: Tensor) -> Tensor:
    """Gradient of the sum of the unsafe scores with respect to predictions (B, C, h, w), in float32.

    Raises:
        ValueError: gradients do not flow through the safety function or the decoder.
    """
    try:
        with (
            differentiable(*decoder.networks, *function.networks),
            ordinary_attributes(decoder.latent_format),
        ):
            leaf = ordinary(latents).detach().float().clone().requires_grad_(True)
            score = function(decoder(leaf)).score
            if not score.requires_grad:
                logging.warning(
                    "Safe Guidance: %s gave a score without a gradient; nothing is guided.", function.name
                )
                return torch.zeros_like(leaf)
            return torch.autograd.grad(score.sum(), leaf)[0]
    except RuntimeError as error:
        if comfy.model_management.is_oom(error):
            raise
        raise ValueError(
            f"Gradients do not flow through {function.name} or the decoder ({str(error).splitlines()[0]}). "
            "Choose another safety function or decoder."
        ) from error


def load_now(function: SafetyFunction) -> torch.device:
    """Have the host load a safety function's networks, and say where it put them."""
    comfy.model_management.load_models_gpu([auxiliary_patcher(network) for network in function.networks])
    return comfy.model_management.get_torch_device()
