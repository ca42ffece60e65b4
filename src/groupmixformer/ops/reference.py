"""What the operations of Group-Mix Attention compute, in plain PyTorch: their definition, on every device.

Letters: B batch, H x W feature map, N = H * W tokens, C width of a segment, E = C / 2 width of a head, S segments, J = 3 for
Q, K and V, T entries of a channel's depthwise kernels, of all segments together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GROUP_SIZES", "POSITION_SIZES", "aggregate_groups", "attend", "attend_heads", "attend_segments", "join_kernels"]

# k of the depthwise kernels: of the segments that are aggregated, and of the position encoding of the four that attend.
GROUP_SIZES = (3, 5, 7)
POSITION_SIZES = (3, 5, 7, 7)


def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attend by factorised attention with position encoding (Sec. 3): scale * Q softmax(K)^T V + Q * position.

    The softmax is taken over the tokens, and K and V meet first, so the cost is linear in N.

    Args:
        q: Queries (..., N, E).
        k: Keys, likewise.
        v: Values, likewise.
        position: The relative position encoding of the values, likewise.
        scale: Factor of the attention, not of the position encoding.
        mask: Where several heads lie side by side in E, 1 within a head and 0 between two (E, E): one product serves them all.

    Returns:
        (..., N, E).
    """
    encoded = q * position
    q, k, v = q.flatten(0, -3), k.flatten(0, -3), v.flatten(0, -3)  # 3 x (heads, N, E)
    context = torch.bmm(k.softmax(dim=1).transpose(1, 2), v)  # (heads, E, E)
    if mask is not None:
        context = context * mask
    return torch.baddbmm(encoded.flatten(0, -3), q, context, alpha=scale).view(encoded.shape)


def attend_heads(qkv: Tensor, position: Tensor, local: Tensor, scale: float, local_heads: int = 0) -> Tensor:
    """Do what `ops.attention.attend_heads` does."""
    q, k, v = qkv.transpose(2, 3).contiguous().unbind(0)  # 3 x (B, h, N, E)
    mixed = attend(q, k, v, position.transpose(1, 2), scale).transpose(1, 2)  # (B, N, h, E)
    if local_heads:  # joined as heads, all are copied once
        return torch.cat([mixed, local.unflatten(2, [local_heads, -1])], dim=2).flatten(2)
    return torch.cat([mixed.flatten(2), local], dim=2)


def join_kernels(weights: Sequence[Tensor]) -> Tensor:
    """Join the depthwise kernels of segments, S x (C, 1, k, k), into (T, C), of which Triton's kernels read a row at a time."""
    return torch.cat([weight.flatten(1).t() for weight in weights])


def _convolve(segments: Tensor, kernel_weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """Convolve each segment with depthwise kernels (T, C) of its own size. (S, J, B, H, W, C) -> same."""
    results = []
    parts = kernel_weights.to(segments.dtype).split([k * k for k in sizes])
    for x, part, k in zip(segments, parts, sizes, strict=True):
        maps = x.flatten(0, 1).permute(0, 3, 1, 2)  # (JB, C, H, W)
        results.append(F.conv2d(maps, part.t().reshape(-1, 1, k, k), padding=k // 2, groups=maps.shape[1]))
    return torch.stack(results).permute(0, 1, 3, 4, 2).reshape(segments.shape)


def aggregate_groups(segments: Tensor, kernel_weights: Tensor) -> Tensor:
    """Do what `ops.attention.aggregate_groups` does."""
    return _convolve(segments, kernel_weights, GROUP_SIZES)


def attend_segments(
    proxies: Sequence[Tensor], local: Tensor, position_weights: Tensor, position_bias: Tensor, scale: float
) -> Tensor:
    """Do what `ops.attention.attend_segments` does."""
    qkv = torch.stack(list(proxies), dim=1)  # (3, 4, B, H, W, C)
    position = _convolve(qkv[2][:, None], position_weights, POSITION_SIZES)[:, 0]  # (4, B, H, W, C)
    position = position + position_bias.to(position.dtype)[:, None, None, None]
    q, k, v, encoded = (x.flatten(2, 3).unflatten(3, (2, -1)).transpose(2, 3) for x in (*qkv, position))  # (4, B, 2, N, E)
    attended = attend(q, k, v, encoded, scale).transpose(2, 3).reshape(position.shape)  # (4, B, H, W, C)
    return torch.cat([*attended, local.to(attended.dtype)], dim=3)
