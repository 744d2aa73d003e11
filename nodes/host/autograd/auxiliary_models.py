"""Loading of decoders and detectors through the host's memory management, together with the sampled model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ....guidance.safety_functions.interface import Assessment, SafetyFunction
from ..engine.correction import KEY

_PATCHER = "_safe_guidance_patcher"
GRADIENT_MEMORY = 3
"""Memory of a gradient pass relative to sampling: it keeps activations that sampling frees at once."""


def auxiliary_patcher(network: nn.Module) -> ModelPatcher:
    """Return the host's patcher of a network, with which the host loads it.

    There is one patcher per network, stored in the network: the host reports a network that outlives its
    patcher as a leak.
    """
    patcher: ModelPatcher | None = vars(network).get(_PATCHER)
    if patcher is None:
        patcher = CoreModelPatcher(
            network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        # The host clones a patcher in this way for further devices.
        patcher.cached_patcher_init = (lambda disable_dynamic=False: auxiliary_patcher(network), ())
        vars(network)[_PATCHER] = patcher
    return patcher


def use_patcher(network: nn.Module, patcher: ModelPatcher) -> None:
    """Load a network of the host with the patcher that the host made for it, not with a second one."""
    vars(network)[_PATCHER] = patcher


def load_networks(networks: Sequence[nn.Module]) -> torch.device:
    """Let the host load networks, and return the device on which they are."""
    comfy.model_management.load_models_gpu([auxiliary_patcher(network) for network in networks])
    return comfy.model_management.get_torch_device()


def load_now(function: SafetyFunction) -> torch.device:
    """Let the host load a safety function's networks, and return the device on which they are."""
    return load_networks(function.networks)


def assess(function: SafetyFunction, images: Tensor) -> Assessment:
    """Let the host load a safety function, and assess images (B, H, W, C) in [0, 1], of which it gets RGB."""
    device = load_now(function)
    return function(images[..., :3].movedim(-1, 1).float().to(device))  # (B, 3, H, W)


def load_along(model: ModelPatcher, patchers: Sequence[ModelPatcher], function: SafetyFunction) -> None:
    """Let the host load a decoder and a safety function with the model, and reserve memory for gradients.

    Args:
        model: the sampled model.
        patchers: of the decoder.
        function: the safety function.
    """
    added = [*patchers, *(auxiliary_patcher(network) for network in function.networks)]
    model.set_additional_models(KEY, [*model.get_additional_models_with_key(KEY), *added])
    reserve_memory(model)


def reserve_memory(model: ModelPatcher) -> None:
    """Have the host leave memory for a gradient pass when it decides how much of the weights to load."""
    if model.get_wrappers(WrappersMP.PREPARE_SAMPLING, KEY):
        return

    def prepare(
        executor: Callable[..., Any],
        patcher: ModelPatcher,
        noise_shape: Sequence[int],
        *args: Any,
        **options: Any,
    ) -> Any:
        return executor(patcher, [GRADIENT_MEMORY * noise_shape[0], *noise_shape[1:]], *args, **options)

    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)
