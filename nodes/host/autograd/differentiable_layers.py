"""Differentiable layers: gradients through ComfyUI's networks while a workflow runs in inference mode.

Weights that a node loaded are inference tensors, which autograd may not save. Some are stored in another
dtype, patched or streamed at every use. Therefore each layer that owns weights becomes one autograd function:
its forward pass is ComfyUI's own, under inference mode, and its backward pass fetches the weight again
through ComfyUI. Autograd differentiates everything between these layers as usual: attention, residuals and
other packs' patches. Weights are never replaced, copied permanently or marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpointing import blocks, checkpointed_forward
from .ordinary_tensors import ordinary, ordinary_weights, with_attributes

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d)

CAUSAL = "causal_zero"
"""The host's option for convolutions over few frames: only the last slices of the weight are used, because
the frames before the first are zero."""

Forward = Callable[..., Tensor]


@contextmanager
def differentiable(*networks: nn.Module, checkpointed: bool = False) -> Iterator[None]:
    """Let gradients flow through the networks to their inputs inside a `with` block.

    Weights get no gradients and stay unchanged. Tensors that autograd will save must not be inference
    tensors: pass `ordinary` copies into the block.

    Args:
        networks: modules of the host, or any others.
        checkpointed: keep only the inputs of the networks' blocks and recompute the rest in the backward
            pass. This takes far less memory and about a third more time.
    """
    training = getattr(comfy.model_management, "in_training", False)
    # With this flag ComfyUI replaces fused kernels that have no backward pass by ordinary operations.
    comfy.model_management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            for module in {id(m): m for network in networks for m in network.modules()}.values():
                is_hosts = hasattr(module, "comfy_cast_weights")
                stack.enter_context(_differentiable_layer(module) if is_hosts else ordinary_weights(module))
            for block in chain.from_iterable(map(blocks, networks if checkpointed else ())):
                stack.enter_context(with_attributes(block, forward=checkpointed_forward(block.forward)))
            yield
    finally:
        comfy.model_management.in_training = training


def _differentiable_layer(module: Any) -> Any:
    """Let gradients flow through one layer of the host, if it owns weights, inside a `with` block."""
    # Patching the method below `forward` keeps other wrappers of `forward`, and ComfyUI's interrupt check.
    run = module.forward_comfy_cast_weights if hasattr(module, "forward_comfy_cast_weights") else None
    function = _function_for(module)
    if run is None or function is None:
        return ExitStack()

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def own(value: Tensor) -> Tensor:
            with torch.inference_mode():
                return run(value, *args, **kwargs)

        if torch.is_grad_enabled() and x.requires_grad:
            is_causal = kwargs.get("autopad") == CAUSAL
            return function.apply(x, module, own, is_causal)  # type: ignore[no-any-return]
        return own(x).clone()

    return with_attributes(
        module, forward_comfy_cast_weights=forward, comfy_cast_weights=True, comfy_force_cast_weights=True
    )


def _function_for(module: nn.Module) -> Any:
    if isinstance(module, NORMS) or (isinstance(module, CONVOLUTIONS) and module.padding_mode != "zeros"):
        return _RecomputedLayer
    if isinstance(module, CONVOLUTIONS) or hasattr(module, "in_features"):
        return _LinearLayer
    return None


@contextmanager
def _weights(module: Any, like: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Fetch weight and bias as ComfyUI would use them for an input `like`: cast, patched and moved."""
    if getattr(module, "weight", None) is None:
        yield None, None
        return
    options = {"device": like.device, "dtype": like.dtype, "bias_dtype": like.dtype, "offloadable": True}
    weight, bias, stream = comfy.ops.cast_bias_weight(module, **options)
    yield (weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()), bias
    comfy.ops.uncast_bias_weight(module, weight, bias, stream)


class _LinearLayer(torch.autograd.Function):
    """Linear layers and convolutions. Nothing is saved: the gradient of the input needs only the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, own: Forward, is_causal: bool) -> Tensor:
        ctx.module, ctx.shape, ctx.is_causal = module, x.shape, is_causal
        return own(x).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        with torch.inference_mode(), _weights(ctx.module, grad) as (weight, _):
            if ctx.is_causal and weight is not None:
                weight = weight[:, :, -ctx.shape[2] :]
            gradient = _input_gradient(ctx.module, ctx.shape, grad, weight)
        return gradient.clone(), None, None, None


def _input_gradient(module: Any, shape: torch.Size, grad: Tensor, weight: Tensor | None) -> Tensor:
    if not isinstance(module, CONVOLUTIONS):
        return torch.matmul(grad, weight)  # type: ignore[arg-type]
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    output_padding = module.output_padding if transposed else (0,) * len(module.stride)
    settings = (module.stride, module.padding, module.dilation, transposed, output_padding, module.groups)
    like_input = grad.new_empty(1).expand(shape)
    return torch.ops.aten.convolution_backward(
        grad, like_input, weight, None, *settings, [True, False, False]
    )[0]


class _RecomputedLayer(torch.autograd.Function):
    """Layers whose gradient needs their input: a copy, because ComfyUI adds to activations in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, own: Forward, _: bool) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x.clone())
        return own(x).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        module, (x,) = ctx.module, ctx.saved_tensors
        with torch.inference_mode(), _weights(module, x) as found:
            fetched = [None if tensor is None else tensor.clone() for tensor in found]
        weight, bias = ordinary(fetched)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(_functional(module, x, weight, bias), x, grad)
        return gradient, None, None, None


def _functional(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, weight, module.eps)
    if isinstance(module, nn.BatchNorm2d):
        return F.batch_norm(
            x,
            ordinary(module.running_mean),
            ordinary(module.running_var),
            weight,
            bias,
            False,
            0.0,
            module.eps,
        )
    return module._conv_forward(x, weight, bias)  # type: ignore[no-any-return]
