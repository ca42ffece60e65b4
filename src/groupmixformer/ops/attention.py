"""The door to the operations of Group-Mix Attention: Triton's kernels where they serve, otherwise plain PyTorch.

- `attend_heads` is what the network does, with all heads at once or, on large maps of a CPU, two at a time, without copies.
- `aggregate_groups` and `attend_segments` are what the fused form does with a map's tokens. On a GPU they are bound by memory
  traffic and launches, so each is one pass there, of `triton_kernels`; elsewhere it is its definition in `reference`.

To compilers the kernels are custom operators (`torch.library`). They have no gradient: where one may be asked for, and in
graphs for other programs, the definition runs, see `dispatch.kernels_available`.

Letters: B batch, H x W feature map, N = H * W tokens, C width of a segment, J = 3 for Q, K and V, T entries of a channel's
depthwise kernels, of all segments together; `join_kernels` lays them out.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from . import dispatch, reference
from .reference import GROUP_SIZES, POSITION_SIZES, attend, join_kernels

__all__ = [
    "GROUP_SIZES",
    "POSITION_SIZES",
    "aggregate_groups",
    "attend",
    "attend_heads",
    "attend_segments",
    "join_kernels",
    "within_heads",
]

# Tokens from which a CPU is faster with two heads at a time, which it reads where they lie, than with all, which it copies.
_LONG = 512


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton starts kernels on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _takes_kernels(x: Tensor) -> bool:
    return x.shape[-1] <= dispatch.MAX_SEGMENT_DIM and dispatch.kernels_available(x)


def within_heads(segment_dim: int, like: Tensor) -> Tensor:
    """Return (C, C) with 1 within each of the two heads of a segment and 0 between them, the mask of `attend`."""
    head = torch.arange(segment_dim, device=like.device) // (segment_dim // 2)
    return (head[:, None] == head).to(like.dtype)


def _attend_in_pairs(qkv: Tensor, position: Tensor, local: Tensor, scale: float) -> Tensor:
    C = 2 * qkv.shape[4]
    mask = within_heads(C, qkv)
    parts = zip(*(x.flatten(2).split(C, dim=2) for x in (*qkv.unbind(0), position)), strict=True)  # h / 2 x 4 x (B, N, C)
    mixed = [attend(q, k, v, encoded, scale, mask) for q, k, v, encoded in parts]
    return torch.cat([*mixed, local], dim=2)


def attend_heads(qkv: Tensor, position: Tensor, local: Tensor, scale: float, local_heads: int = 0) -> Tensor:
    """Attend with heads side by side, as `attend` does with one, beside the branch without attention.

    Args:
        qkv: Q, K and V (3, B, N, h, E), h even.
        position: The relative position encoding of V (B, N, h, E).
        local: What the branch without attention gives (B, N, L).
        scale: Factor of the attention, not of the position encoding.
        local_heads: L / E where that is a whole number, to spare a copy.

    Returns:
        (B, N, h * E + L).
    """
    if torch.jit.is_scripting():
        mixed = reference.attend_heads(qkv, position, local, scale, local_heads)
    elif dispatch.is_eager() and isinstance(qkv, Tensor) and qkv.device.type == "cpu" and qkv.shape[2] >= _LONG:
        mixed = _attend_in_pairs(qkv, position, local, scale)
    else:
        mixed = reference.attend_heads(qkv, position, local, scale, local_heads)
    return mixed


@torch.library.custom_op("groupmixformer::aggregate_groups", mutates_args=())
def _aggregate_groups(segments: Tensor, kernel_weights: Tensor) -> Tensor:
    from . import triton_kernels  # Triton is slow to import, and not on every system

    with _device_of(segments):
        return triton_kernels.aggregate_groups(segments, kernel_weights)


@_aggregate_groups.register_fake
def _(segments: Tensor, kernel_weights: Tensor) -> Tensor:
    return segments.new_empty(segments.shape)


@torch.library.custom_op("groupmixformer::attend_segments", mutates_args=())
def _attend_segments(
    proxies: Sequence[Tensor], local: Tensor, position_weights: Tensor, position_bias: Tensor, scale: float
) -> Tensor:
    from . import triton_kernels

    with _device_of(local):
        return triton_kernels.attend_segments(proxies, local, position_weights, position_bias, scale)


@_attend_segments.register_fake
def _(proxies: Sequence[Tensor], local: Tensor, position_weights: Tensor, position_bias: Tensor, scale: float) -> Tensor:
    return proxies[0].new_empty(*local.shape[:-1], 5 * local.shape[-1])


def aggregate_groups(segments: Tensor, kernel_weights: Tensor) -> Tensor:
    """Aggregate Q, K and V over 3 x 3, 5 x 5 and 7 x 7 neighbours: the depthwise convolutions of three segments (Sec. 3).

    Args:
        segments: Segments 1 to 3 of Q, K and V (3, J, B, H, W, C), a view of what the linear layer wrote.
        kernel_weights: Their depthwise kernels, the same for Q, K and V (T, C).

    Returns:
        (3, J, B, H, W, C).
    """
    if _takes_kernels(segments):
        return _aggregate_groups(segments, kernel_weights)
    return reference.aggregate_groups(segments, kernel_weights)


def attend_segments(
    proxies: Sequence[Tensor], local: Tensor, position_weights: Tensor, position_bias: Tensor, scale: float
) -> Tensor:
    """Attend with the four segments and their relative position encoding, beside the branch without attention (Sec. 3).

    A segment has two heads. Of each it is scale * Q softmax(K)^T V + Q * position, as in `attend`, where position is the
    depthwise convolution of V.

    Args:
        proxies: Of each segment Q, K and V, 4 x (J, B, H, W, C), of one type.
        local: What the branch without attention gives (B, H, W, C).
        position_weights: The depthwise kernels of the position encoding (T, C).
        position_bias: Their biases (4, C).
        scale: Factor of the attention, not of the position encoding.

    Returns:
        (B, H, W, 5C), of the proxies' type: the segments side by side, `local` last.
    """
    if _takes_kernels(local):
        return _attend_segments(proxies, local, position_weights, position_bias, scale)
    return reference.attend_segments(proxies, local, position_weights, position_bias, scale)
