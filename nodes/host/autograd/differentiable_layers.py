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
from typing import Any

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d)

Forward = Callable[..., Tensor]


@contextmanager
def differentiable(*networks: nn.Module, checkpointed: bool = False) -> Iterator[None]:
    """Let gradients flow through the networks to their inputs inside a `with` block.

    Weights get no gradients and stay unchanged.

    Tensors that autograd will save must not be inference tensors: pass `ordinary` copies into the block.

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
                stack.enter_context(
                    _island(module) if hasattr(module, "comfy_cast_weights") else _ordinary_weights(module)
                )
            if checkpointed:
                for network in networks:
                    for block in blocks(network):
                        stack.enter_context(_attributes(block, forward=_checkpointed(block.forward)))
            yield
    finally:
        comfy.model_management.in_training = training


def ordinary(value: Any) -> Any:
    """Return `value`, or a copy that autograd may save if it is an inference tensor.

    Lists are converted element by element.
    """
    if isinstance(value, list):
        return [ordinary(element) for element in value]
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@contextmanager
def ordinary_attributes(holder: Any) -> Iterator[None]:
    """Replace an object's own inference tensors by ordinary ones for the length of a block."""
    tensors = {
        name: value
        for name, value in vars(holder).items()
        if isinstance(value, Tensor) and value.is_inference()
    }
    with _attributes(holder, **{name: ordinary(value) for name, value in tensors.items()}):
        yield


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a network: the elements of its module lists.

    A UNet's blocks are split into their layers, because ComfyUI calls these one by one.
    """
    middle = getattr(network, "middle_block", None)
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    for element in [
        *(element for found in lists for element in found),
        *([middle] if isinstance(middle, nn.Module) else []),
    ]:
        yield from element if isinstance(element, nn.Sequential) else (element,)


@contextmanager
def _attributes(holder: Any, **values: Any) -> Iterator[None]:
    """Set an object's own attributes, and restore the previous ones afterwards."""
    before = {name: vars(holder)[name] for name in values if name in vars(holder)}
    vars(holder).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(holder)[name]
        vars(holder).update(before)


@contextmanager
def _ordinary_weights(module: nn.Module) -> Iterator[None]:
    """Replace weights that model code uses directly by copies, for one module and for this pass only."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = [
        (owned, name, tensor)
        for owned in (module._parameters, module._buffers)
        for name, tensor in owned.items()
        if tensor is not None and tensor.is_inference()
    ]
    for owned, name, tensor in replaced:
        copy = tensor.detach().clone()
        owned[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
    try:
        yield
    finally:
        for owned, name, tensor in replaced:
            owned[name] = tensor


def _island(module: Any) -> Any:
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
            return function.apply(x, module, own)  # type: ignore[no-any-return]
        return own(x).clone()

    return _attributes(
        module, forward_comfy_cast_weights=forward, comfy_cast_weights=True, comfy_force_cast_weights=True
    )


def _function_for(module: nn.Module) -> Any:
    if isinstance(module, NORMS) or (isinstance(module, CONVOLUTIONS) and module.padding_mode != "zeros"):
        return _RecomputedIsland
    if isinstance(module, CONVOLUTIONS) or hasattr(module, "in_features"):
        return _LinearIsland
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


class _LinearIsland(torch.autograd.Function):
    """Linear layers and convolutions. Nothing is saved: the gradient of the input needs only the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, own: Forward) -> Tensor:
        ctx.module, ctx.shape = module, x.shape
        return own(x).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        with torch.inference_mode(), _weights(ctx.module, grad) as (weight, _):
            gradient = _input_gradient(ctx.module, ctx.shape, grad, weight)
        return gradient.clone(), None, None


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


class _RecomputedIsland(torch.autograd.Function):
    """Layers whose gradient needs their input: a copy, because ComfyUI adds to activations in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, own: Forward) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x.clone())
        return own(x).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        module, (x,) = ctx.module, ctx.saved_tensors
        with torch.inference_mode(), _weights(module, x) as found:
            fetched = [None if tensor is None else tensor.clone() for tensor in found]
        weight, bias = ordinary(fetched)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(_functional(module, x, weight, bias), x, grad)
        return gradient, None, None


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


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def own(value: Any) -> Any:
        # ComfyUI adds to activations in place and counts blocks in its options: each run gets copies.
        if isinstance(value, dict):
            return value.copy()
        return value.clone() if isinstance(value, Tensor) else value

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(_snapshot, args)), {name: _snapshot(value) for name, value in kwargs.items()}

        def again() -> Any:
            return forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

        return checkpoint(again, use_reentrant=False, preserve_rng_state=False)

    return run


def _snapshot(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value
