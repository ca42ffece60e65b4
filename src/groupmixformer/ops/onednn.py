"""Layers that a CPU computes faster than PyTorch has it do, by asking oneDNN in another way. Elsewhere they are PyTorch's.

- Products of linear layers in float32 PyTorch leaves to MKL; large ones of oneDNN are faster where this was measured, and take
  the activation along, which the fused form makes use of. In the plain network they were worth 4 to 8 %, so it does without.
- Gradients of depthwise kernels: oneDNN has a fast one for kernels that are up to three columns wide; wider ones take its
  general path, which is several times slower. The columns of a gradient do not depend on each other, so that of a wide kernel
  is put together from those of narrow ones, over shifted maps.
- A depthwise convolution of maps of one pixel is a product with the middle of the kernel; oneDNN takes milliseconds for it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from . import dispatch

__all__ = ["depthwise", "linear"]

AVAILABLE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
BFLOAT16_AVAILABLE = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Multiply-adds from which oneDNN's product is the faster one: its call takes longer.
_LARGE = 2**21
_ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "hardswish": F.hardswish}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return result


@torch.library.custom_op("groupmixformer::linear", mutates_args=())
def _compiled_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _product(x, weight, bias, activation)  # Inductor would take MKL's, and stumbles over oneDNN's own operator


@_compiled_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _operations(shape: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * math.prod(shape) * out_shape[-1]


if AVAILABLE:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_operations)


def _has_faster_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = [tensor for tensor in (x, weight, bias) if isinstance(tensor, Tensor)]  # no proxy of torch.fx
    return (
        AVAILABLE
        and isinstance(x, Tensor)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and BFLOAT16_AVAILABLE and dispatch.is_eager()))
        and type(weight) in (Tensor, nn.Parameter)  # not quantised or spread over devices
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        and dispatch.is_eager_or_compiled()
        and x.numel() * weight.shape[0] >= _LARGE  # last, or it becomes a limit of an exported program
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Apply a linear layer and an activation.

    Args:
        x: (..., D_in), at least two dimensions.
        weight: (D_out, D_in).
        bias: (D_out).
        activation: 'gelu', 'hardswish' or 'none'.

    Returns:
        (..., D_out).
    """
    if not _has_faster_product(x, weight, bias):
        return _ACTIVATIONS[activation](F.linear(x, weight, bias))
    if torch.compiler.is_compiling():
        return _compiled_product(x, weight, bias, activation)
    return _product(x, weight, bias, activation)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient (C, 1, k, k) of a kernel, three columns at a time. `grad` and `x` are (B, C, H, W)."""
    k = weight.shape[-1]
    columns = []
    for first in range(0, k - 2, 2):
        left, right = k // 2 - first, first + 2 - k // 2  # of what three columns reach; negative where the map is cut
        both = max(0, min(left, right))
        shifted = F.pad(x, (left - both, right - both)) if left != right else x
        part = conv2d_weight(shifted, (*weight.shape[:3], 3), grad, padding=(k // 2, both), groups=weight.shape[0])
        columns.append(part[..., 1:] if first else part)  # the first column is the last of those before
    return torch.cat(columns, dim=3)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            depthwise(grad, weight.flip(2, 3)) if to_x else None,
            _weight_gradient(grad, x, weight) if to_weight else None,
            grad.sum((0, 2, 3)) if to_bias else None,  # oneDNN would make the weight's again for it
        )


def _type(x: Tensor) -> torch.dtype:
    """Return the type in which a convolution of `x` runs."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _has_faster_gradient(x: Tensor, weight: Tensor) -> bool:
    return (
        AVAILABLE
        and isinstance(x, Tensor)  # no proxy of torch.fx
        and x.device.type == "cpu"
        and x.dtype != torch.float64
        and _type(x) in (torch.float32, torch.bfloat16)
        and weight.shape[-1] > 3
        and x.numel() >= 2**15
        and torch.is_grad_enabled()
        and weight.requires_grad
        and dispatch.is_eager()
    )


def _with_fast_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kind = _type(x)  # autocast does not reach into what follows
    result: Tensor = _Depthwise.apply(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
    return result


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with a kernel of its own; the map keeps its size.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k), k odd.
        bias: (C).

    Returns:
        (B, C, H, W).
    """
    if x.shape[2:] == (1, 1):
        centre = weight.shape[-1] // 2
        x = x * weight[:, 0, centre, centre, None, None]
        return x if bias is None else x + bias[:, None, None]
    if _has_faster_gradient(x, weight):
        return _with_fast_gradient(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
