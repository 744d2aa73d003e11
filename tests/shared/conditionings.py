"""Everything that the host's nodes put on a conditioning, each as a function of the conditioning.

Import this module after the host: it needs `comfy`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.ops
import node_helpers
import torch

import nodes
import tiny_models

Conditioning = list[Any]
Decoration = Callable[[Conditioning], Conditioning]


@cache
def controlnet() -> Any:
    """Return a ControlNet of tiny SD 1.x models whose effect is large."""
    config = {
        name: list(value) if isinstance(value, list) else value
        for name, value in tiny_models.UNET.items()
        if name not in ("out_channels", "transformer_depth_output")
    }
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, operations=comfy.ops.disable_weight_init, dtype=torch.float32
    )
    network.load_state_dict(tiny_models.random_weights(network, 7))
    return comfy.controlnet.ControlNet(network)


def _hint() -> torch.Tensor:
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))


@cache
def _with_control() -> Any:
    control = controlnet().copy().set_cond_hint(_hint().movedim(-1, 1), 1.0, (0.0, 1.0))
    return control


def _set(**values: Any) -> Decoration:
    return lambda conditioning: node_helpers.conditioning_set_values(conditioning, values)


@cache
def _lora(keyframed: bool = False) -> Any:
    """Return the hook of a LoRA that changes the tiny SD 1.x model's attention."""
    generator = torch.Generator().manual_seed(3)
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    shape = dict(tiny_models.tiny_model("sd1").model.named_parameters())[name].shape
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    hook = hooks.hooks[0]
    hook.weights = {name: ("diff", (torch.randn(shape, generator=generator),))}
    hook.need_weight_init = False
    if keyframed:
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(0.2, 0.0))
        frames.add(comfy.hooks.HookKeyframe(1.5, 0.4))
        hooks.set_keyframes_on_hooks(frames)
    return hooks


def lora_hooks(keyframed: bool = False) -> Decoration:
    """Return the decoration of `Set CLIP Hooks` and `Cond Set Props`: a LoRA on one conditioning."""
    return lambda conditioning: comfy.hooks.set_hooks_for_conditioning(conditioning, _lora(keyframed))


def _mask(columns: slice) -> torch.Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[..., columns] = 1.0
    return mask


def _regions(conditioning: Conditioning) -> Conditioning:
    left, right = _mask(slice(0, 32)), _mask(slice(16, 64))
    set_mask = nodes.ConditioningSetMask().append
    return [
        *set_mask(conditioning, left, "default", 1.0)[0],
        *set_mask(conditioning, right, "default", 0.5)[0],
    ]


def _schedule(conditioning: Conditioning) -> Conditioning:
    set_range = nodes.ConditioningSetTimestepRange().set_range
    early = _set(control=_with_control(), control_apply_to_uncond=False)(conditioning)
    return [*set_range(early, 0.0, 0.5)[0], *set_range(conditioning, 0.5, 1.0)[0]]


def _beside_a_default(conditioning: Conditioning) -> Conditioning:
    masked = nodes.ConditioningSetMask().append(conditioning, _mask(slice(0, 24)), "default", 1.0)[0]
    return comfy.hooks.set_default_conds_and_combine([masked], [conditioning])[0]


def _area(conditioning: Conditioning) -> Conditioning:
    return [*conditioning, *nodes.ConditioningSetArea().append(conditioning, 64, 48, 0, 16, 0.7)[0]]


def _latent(channels: int, seed: int) -> torch.Tensor:
    return torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


DECORATIONS: dict[str, tuple[str, Decoration]] = {
    "ControlNet": ("sd1", lambda c: _set(control=_with_control(), control_apply_to_uncond=False)(c)),
    "inpaint image and mask": (
        "sd1 inpaint",
        _set(concat_latent_image=_latent(4, 5), concat_mask=_mask(slice(0, 40))[:, None].round()),
    ),
    "LoRA hook": ("sd1", lora_hooks()),
    "LoRA hook with keyframes": ("sd1", lora_hooks(keyframed=True)),
    "mask": ("sd1", lambda c: nodes.ConditioningSetMask().append(c, _mask(slice(0, 40)), "default", 1.0)[0]),
    "mask bounds": (
        "sd1",
        lambda c: nodes.ConditioningSetMask().append(c, _mask(slice(8, 40)), "mask bounds", 1.0)[0],
    ),
    "regions": ("sd1", _regions),
    "area": ("sd1", _area),
    "strength": ("sd1", lambda c: nodes.ConditioningSetAreaStrength().append(c, 0.6)[0]),
    "timestep range": ("sd1", _schedule),
    "default beside a mask": ("sd1", _beside_a_default),
    "ControlNet in a region with a LoRA": (
        "sd1",
        lambda c: [*_regions(lora_hooks()(DECORATIONS["ControlNet"][1](c)))],
    ),
    "sizes of SDXL": (
        "sdxl",
        _set(width=512, height=2048, crop_w=99, crop_h=7, target_width=64, target_height=4096),
    ),
    "guidance of Flux": ("flux", _set(guidance=50.0)),
    "reference latents": ("flux", _set(reference_latents=[_latent(16, 6), _latent(16, 7)])),
}
"""The tiny model's family and the function, by name. All are for images of 64 by 64 pixels."""
