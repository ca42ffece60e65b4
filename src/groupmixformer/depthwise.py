"""Depthwise convolutions whose gradient is fast on a CPU.

oneDNN has a fast gradient of depthwise kernels that are up to three columns wide; wider ones take its general path, which is
several times slower. The columns of a gradient do not depend on each other, so that of a wide kernel is put together here from
those of narrow ones, over shifted maps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_weight

__all__ = ["Depthwise", "depthwise"]


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


@torch.jit.unused
def _is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and isinstance(x, Tensor)  # no proxy of torch.fx
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and x.dtype != torch.float64
        and _type(x) in (torch.float32, torch.bfloat16)
        and weight.shape[-1] > 3
        and x.numel() >= 2**15
        and torch.is_grad_enabled()
        and weight.requires_grad
        and torch._C._functorch.maybe_current_level() is None  # torch.func and forward mode have rules of their own
        and forward_ad._current_level < 0
    )


@torch.jit.unused
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
    if not torch.jit.is_scripting() and _is_faster(x, weight):
        return _with_fast_gradient(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


class Depthwise(nn.Conv2d):
    """A depthwise convolution k x k, k odd, without bias. (B, C, H, W) -> (B, C, ceil(H/s), ceil(W/s))."""

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=False, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, C, ceil(H/s), ceil(W/s))."""
        if self.stride == (1, 1):
            return depthwise(input, self.weight)
        return self._conv_forward(input, self.weight, self.bias)
