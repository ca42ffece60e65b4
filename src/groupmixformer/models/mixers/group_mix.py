"""Group-Mix Attention with options, for the paper's ablations."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.attention import attend
from ..groupmixformer import ConvRelativePosition, NonAttention
from ..layers import BatchNorm2d, Depthwise, Hardswish, check_map, tokens_as_map
from .base import Mixer

SHARED = 4  # segments that attend


class _Pool(nn.Module):
    """The mean, largest or smallest of k x k neighbours on the map, channel by channel. (B, C, H, W) -> same."""

    def __init__(self, kind: str, kernel_size: int) -> None:
        super().__init__()
        self.kind, self.kernel_size = kind, kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        k = self.kernel_size
        if self.kind == "avg":
            x = F.avg_pool2d(x, k, 1, k // 2, count_include_pad=False)
        elif self.kind == "max":
            x = F.max_pool2d(x, k, 1, k // 2)
        else:
            x = -F.max_pool2d(-x, k, 1, k // 2)
        return x


class _Aggregators(nn.Module):
    """As `GroupAggregators`, with other sizes or pools. Four segments side by side (B, 4C, H, W) -> their proxies, likewise."""

    def __init__(self, dim: int, aggregator: str, kernel_sizes: tuple[int, ...], **dd: Any) -> None:
        super().__init__()
        grouped = [k > 1 and aggregator != "none" for k in kernel_sizes]
        self.depthwise = nn.ModuleList(
            (Depthwise(dim, k, **dd) if aggregator == "conv" else _Pool(aggregator, k)) if wanted else nn.Identity()
            for k, wanted in zip(kernel_sizes, grouped, strict=True)
        )
        self.pointwise = nn.ModuleList(
            nn.Conv2d(dim, dim, 1, bias=False, **dd) if wanted else nn.Identity() for wanted in grouped
        )
        self.norm = BatchNorm2d(SHARED * dim, **dd)
        self.act = Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 4C, H, W)."""
        segments = x.chunk(4, dim=1)
        proxies = [segments[0]]
        for i, (depthwise, pointwise) in enumerate(zip(self.depthwise, self.pointwise)):  # noqa: B905 (TorchScript)
            proxies.append(pointwise(depthwise(segments[i + 1])))
        return self.act(self.norm(torch.cat(proxies, dim=1)))


class GroupMix(Mixer):
    """Group-Mix Attention (arXiv 2311.15157, Sec. 3) with what its ablations change, written for clarity, not for speed.

    With the default options it computes what `GroupMixAttention` does, from the same parameters, which `group_mix` without
    options is.

    Cost per token, with C = D/5 (D/4 without the branch), h heads and k the sizes: 4D^2 + 3 sum(k^2 C + C^2) over the three
    segments (once instead of 3 times with aggregate v or after; k^2 C for convolutions alone), 27C + 3C^2 for the branch, 120C
    for the position encoding and 32C^2/h for the attention.

    Args:
        aggregator: What turns segments 1 to 3 into groups, before a 1 x 1: conv (depthwise, as published), avg, max or min
            (pools); none leaves single tokens in all segments.
        kernel_sizes: Sides of the groups in segments 1 to 3, odd; 1 leaves single tokens.
        non_attention: Have the branch without attention; its channels go to the four segments that attend otherwise.
        position: Have the relative position encoding.
        heads: A multiple of 4: as many in each of the four segments that attend. With the branch any `dim` of at least 10 will
            do, whose segment is as wide as the heads leave; without it, heads divide `dim`.
        aggregate: Where the aggregators, with their norm and activation, are: before Q, K and V (qkv, as published), before V
            alone (v), or after the attention (after).
    """

    def __init__(
        self,
        dim: int,
        *,
        stage: int = 0,
        depth: int = 0,
        aggregator: Literal["conv", "avg", "max", "min", "none"] = "conv",
        kernel_sizes: tuple[int, int, int] = (3, 5, 7),
        non_attention: bool = True,
        position: bool = True,
        aggregate: Literal["qkv", "v", "after"] = "qkv",
        heads: int = 8,
        **dd: Any,
    ) -> None:
        super().__init__()
        if heads < SHARED or heads % SHARED:
            raise ValueError(f"got heads={heads}, expected a multiple of {SHARED}: as many in each segment that attends")
        if dim <= heads or (dim % heads and not non_attention):
            wanted = f"more than its {heads} heads" if non_attention else f"a multiple of its {heads} heads"
            raise ValueError(f"got dim={dim}, expected {wanted}")
        if aggregator not in ("conv", "avg", "max", "min", "none"):
            raise ValueError(f"got aggregator={aggregator!r}, expected conv, avg, max, min or none")
        if aggregate not in ("qkv", "v", "after"):
            raise ValueError(f"got aggregate={aggregate!r}, expected qkv, v or after")
        if len(kernel_sizes) != 3 or any(k < 1 or k % 2 == 0 for k in kernel_sizes):
            raise ValueError(f"got kernel_sizes={list(kernel_sizes)}, expected three odd sides, such as 3, 5, 7")
        self.dim, self.aggregate, self.n_heads = dim, aggregate, heads
        head_dim = min(max(1, round(0.8 * dim / heads)), (dim - 1) // heads) if non_attention else dim // heads
        C = self.segment_dim = head_dim * heads // SHARED
        self.local_dim = dim - SHARED * C
        self.kernel_macs = [(k * k * C if aggregator == "conv" else 0) + C * C for k in kernel_sizes if k > 1]
        if aggregator == "none":
            self.kernel_macs = []
        self.scale = (dim / heads) ** -0.5  # as published
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.aggregators = _Aggregators(C, aggregator, tuple(kernel_sizes), **dd)
        self.non_attention = NonAttention(self.local_dim, **dd) if non_attention else None
        self.position = ConvRelativePosition(head_dim, heads, **dd) if position else None
        self.proj = nn.Linear(dim, dim, **dd)

    def _macs(self, height: int, width: int) -> float:
        D, C, L = self.dim, self.segment_dim, self.local_dim
        total = 4 * D**2 + 2 * (4 * C) ** 2 // self.n_heads + (3 if self.aggregate == "qkv" else 1) * sum(self.kernel_macs)
        if self.position is not None:
            total += sum(k * k * width for k, width in zip((3, 5, 7), self.position.splits, strict=True))
        total += 27 * L + 3 * L**2
        return height * width * total

    def heads(self, x: Tensor) -> Tensor:
        """Read the channels as heads: (B, hE, H, W) -> (B, h, N, E)."""
        return x.flatten(2).unflatten(1, [self.n_heads, x.shape[1] // self.n_heads]).transpose(2, 3)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return (B, D, H, W); with `size`, the height and width of a map, tokens (B, N, D) of tokens."""
        if size is not None:
            x = tokens_as_map(x, self.dim, size)
        check_map(x, self.dim)
        B, _, H, W = x.shape
        qkv = self.qkv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, 3D, H, W)
        parts = qkv.chunk(3, dim=1)
        attending = 4 * self.segment_dim
        q, k, v = parts[0][:, :attending], parts[1][:, :attending], parts[2][:, :attending]  # (B, hE, H, W)
        if self.aggregate == "qkv":
            q, k, v = self.aggregators(torch.cat([q, k, v])).chunk(3)  # one after another in the batch: joint statistics
        elif self.aggregate == "v":
            v = self.aggregators(v)
        position = torch.zeros_like(v) if self.position is None else self.position(v)
        mixed = attend(self.heads(q), self.heads(k), self.heads(v), self.heads(position), self.scale)  # (B, h, N, E)
        mixed = mixed.transpose(2, 3).reshape(B, attending, H, W)
        if self.aggregate == "after":
            mixed = self.aggregators(mixed)
        if self.non_attention is not None:
            last = [part[:, attending:] for part in parts]
            mixed = torch.cat([mixed, self.non_attention(torch.cat(last, dim=1))], dim=1)
        mixed = self.proj(mixed.permute(0, 2, 3, 1))
        return mixed.permute(0, 3, 1, 2) if size is None else mixed.flatten(1, 2)
