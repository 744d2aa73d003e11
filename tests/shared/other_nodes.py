"""Everything of the host that wraps, caches, tiles, masks, compiles or repeats a tiny SD 1.x model.

Import this module after the host: it needs its extra nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import comfy_extras.nodes_apg as apg
import comfy_extras.nodes_cfg as cfg
import comfy_extras.nodes_context_windows as context_windows
import comfy_extras.nodes_custom_sampler as custom_sampler
import comfy_extras.nodes_differential_diffusion as differential_diffusion
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_eps as eps
import comfy_extras.nodes_freelunch as freelunch
import comfy_extras.nodes_fresca as fresca
import comfy_extras.nodes_hypertile as hypertile
import comfy_extras.nodes_mahiro as mahiro
import comfy_extras.nodes_model_advanced as model_advanced
import comfy_extras.nodes_model_downscale as model_downscale
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_pag as pag
import comfy_extras.nodes_perpneg as perpneg
import comfy_extras.nodes_sag as sag
import comfy_extras.nodes_tcfg as tcfg
import comfy_extras.nodes_tomesd as tomesd
import comfy_extras.nodes_torch_compile as torch_compile
import conditionings
import torch
from torch import Tensor

import tiny_models

Model = Any
Conditioning = list[Any]
CFG = 3.0


def _cfg_guider(model: Model, positive: Conditioning, negative: Conditioning) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(CFG)
    return guider


def _third() -> Conditioning:
    conditioning: Conditioning = tiny_models.tiny_conditioning(5)
    return conditioning


def _dual_cfg(style: str) -> Callable[[Model, Conditioning, Conditioning], Any]:
    def guider(model: Model, positive: Conditioning, negative: Conditioning) -> Any:
        return custom_sampler.DualCFGGuider.execute(
            model, positive, _third(), negative, CFG, 2.0, style
        ).args[0]

    return guider


def _perpneg_guider(model: Model, positive: Conditioning, negative: Conditioning) -> Any:
    return perpneg.PerpNegGuider.execute(model, positive, negative, _third(), CFG, 1.0).args[0]


@dataclass(frozen=True)
class Other:
    """Something of the host beside this pack.

    Attributes:
        patch: returns the MODEL with the node.
        decorate: puts something on every conditioning.
        guider: makes the sampler's guider.
        family: the tiny model's family.
        is_masked: True to sample with an inpainting mask.
        has_hooks: True if weights change during sampling, which gradients do not allow.
        is_cache: True if what happens at a step depends on earlier steps of all images of a batch.
        batch: number of images; the host's context windows take one.
        calls: model calls for one prediction, each with as many rows.
        is_slow: True to try only a method that evaluates nothing by itself.
    """

    patch: Callable[[Model], Model] = lambda model: model
    decorate: Callable[[Conditioning], Conditioning] = lambda conditioning: conditioning
    guider: Callable[[Model, Conditioning, Conditioning], Any] = _cfg_guider
    family: str = "sd1"
    is_masked: bool = False
    has_hooks: bool = False
    is_cache: bool = False
    batch: int = 2
    calls: int = 1
    is_slow: bool = False


def _node(node: Any, *values: Any) -> Other:
    return Other(lambda model: _output(node.execute(model, *values)))


def _output(output: Any) -> Model:
    """Return a node's MODEL; some nodes return a tuple."""
    return output[0] if isinstance(output, tuple) else output.args[0]


def _with(name: str, **facts: Any) -> Other:
    family, decorate = conditionings.DECORATIONS[name]
    return Other(decorate=decorate, family=family, **facts)


def _tiled(is_batched: bool) -> Other:
    """Return the way in which MultiDiffusion packs evaluate: halves of the image that overlap."""
    tiles = (slice(0, 10), slice(6, 16))

    def wrapper(apply_model: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        x, timestep, c = call["input"], call["timestep"], call["c"]
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        parts = [x[..., tile] for tile in tiles]
        if is_batched:
            doubled = {k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in c.items()}
            found = apply_model(torch.cat(parts), torch.cat([timestep] * 2), **doubled).chunk(2)
        else:
            found = [apply_model(part, timestep, **c) for part in parts]
        for tile, part in zip(tiles, found):
            total[..., tile] += part
            count[..., tile] += 1
        return total / count

    def patch(model: Model) -> Model:
        patched = model.clone()
        patched.set_model_unet_function_wrapper(wrapper)
        return patched

    return Other(patch, calls=2)


OTHERS: dict[str, Other] = {
    "nothing": Other(),
    "self-attention guidance": _node(sag.SelfAttentionGuidance, 0.5, 2.0),
    "perturbed-attention guidance": _node(pag.PerturbedAttentionGuidance, 3.0),
    "EasyCache": Other(
        lambda model: easycache.EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0], is_cache=True
    ),
    "LazyCache": Other(
        lambda model: easycache.LazyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0], is_cache=True
    ),
    "context windows": Other(
        lambda model: context_windows.ContextWindowsManualNode.execute(
            model, 12, 4, "standard_static", 1, False, "pyramid", 2, False
        ).args[0],
        batch=1,
    ),
    "tiles in one batch": _tiled(True),
    "tile by tile": _tiled(False),
    "HyperTile": _node(hypertile.HyperTile, 64, 1, 0, False),
    "deep shrink": _node(
        model_downscale.PatchModelAddDownscale, 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"
    ),
    "token merging": _node(tomesd.TomePatchModel, 0.3),
    "FreeU": _node(freelunch.FreeU, 1.1, 1.2, 0.9, 0.2),
    "FreeU V2": _node(freelunch.FreeU_V2, 1.3, 1.4, 0.9, 0.2),
    "RescaleCFG": Other(lambda model: model_advanced.RescaleCFG().patch(model, 0.7)[0]),
    "CFG-Zero*": _node(cfg.CFGZeroStar),
    "CFG norm": _node(cfg.CFGNorm, 1.0),
    "adaptive projected guidance": _node(apg.APG, 1.0, 5.0, 0.0),
    "tangential damping": _node(tcfg.TCFG),
    "normalized attention guidance": _node(nag.NAGuidance, 5.0, 0.5, 1.5),
    "epsilon scaling": _node(eps.EpsilonScaling, 1.005),
    "Mahiro": _node(mahiro.Mahiro),
    "FreSca": _node(fresca.FreSca, 1.0, 1.25, 20),
    "differential diffusion": Other(
        lambda model: differential_diffusion.DifferentialDiffusion.execute(model, 1.0).args[0], is_masked=True
    ),
    "inpainting": Other(is_masked=True),
    "compiled": Other(
        lambda model: torch_compile.TorchCompileModel.execute(model, "eager").args[0], is_slow=True
    ),
    "perpendicular negative": Other(lambda model: perpneg.PerpNeg.execute(model, _third(), 1.0).args[0]),
    "perpendicular negative guider": Other(guider=_perpneg_guider),
    "two prompts": Other(guider=_dual_cfg("regular")),
    "two prompts, nested": Other(guider=_dual_cfg("nested")),
    "regions": _with("regions", calls=2),
    "timestep ranges with a ControlNet": _with("timestep range"),
    "ControlNet": _with("ControlNet"),
    "inpainting model": _with("inpaint image and mask", is_masked=True),
    "LoRA hook": _with("LoRA hook with keyframes", has_hooks=True),
}
