"""Group-Mix Attention with options, for the paper's ablations."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.attention import attend
from ..groupmixformer import ConvRelativePosition, NonAttention
from ..layers import BatchNorm2d, Depthwise, Hardswish, check_map
from .base import Mixer

SHARED = 4  # segments that attend, with two heads each


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

    Cost per token, with C = D/5 (D/4 without the branch) and k the sizes: 4D^2 + 3 sum(k^2 C + C^2) over the three segments
    (once instead of 3 times with aggregate v or after; k^2 C for convolutions alone), 27C + 3C^2 for the branch, 120C for the
    position encoding and 4C^2 for the attention.

    Args:
        aggregator: What turns segments 1 to 3 into groups, before a 1 x 1: conv (depthwise, as published), avg, max or min
            (pools); none leaves single tokens in all segments.
        kernel_sizes: Sides of the groups in segments 1 to 3, odd; 1 leaves single tokens.
        non_attention: Have the branch without attention; its channels go to the four segments that attend otherwise.
        position: Have the relative position encoding.
        inner_dim: Width between the two linear layers, for a `dim` that is no multiple of 10; by default `dim`.
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
        inner_dim: int | None = None,
        **dd: Any,
    ) -> None:
        super().__init__()
        segments, inner = SHARED + int(non_attention), dim if inner_dim is None else inner_dim
        if inner <= 0 or inner % (2 * segments):
            raise ValueError(
                f"got dim={inner}, expected a positive multiple of {2 * segments}: {segments} segments of two heads"
            )
        if aggregator not in ("conv", "avg", "max", "min", "none"):
            raise ValueError(f"got aggregator={aggregator!r}, expected conv, avg, max, min or none")
        if aggregate not in ("qkv", "v", "after"):
            raise ValueError(f"got aggregate={aggregate!r}, expected qkv, v or after")
        if len(kernel_sizes) != 3 or any(k < 1 or k % 2 == 0 for k in kernel_sizes):
            raise ValueError(f"got kernel_sizes={list(kernel_sizes)}, expected three odd sides, such as 3, 5, 7")
        self.dim, self.inner_dim, self.aggregate = dim, inner, aggregate
        C = self.segment_dim = inner // segments
        self.kernel_macs = [(k * k * C if aggregator == "conv" else 0) + C * C for k in kernel_sizes if k > 1]
        if aggregator == "none":
            self.kernel_macs = []
        self.scale = (inner / 8) ** -0.5  # as published
        self.qkv = nn.Linear(dim, 3 * inner, **dd)
        self.aggregators = _Aggregators(C, aggregator, tuple(kernel_sizes), **dd)
        self.non_attention = NonAttention(C, **dd) if non_attention else None
        self.position = ConvRelativePosition(C // 2, **dd) if position else None
        self.proj = nn.Linear(inner, dim, **dd)

    def _macs(self, height: int, width: int) -> float:
        D, C = self.dim, self.segment_dim
        total = 4 * D * self.inner_dim + 4 * C**2 + (3 if self.aggregate == "qkv" else 1) * sum(self.kernel_macs)
        total += (27 * C + 3 * C**2 if self.non_attention is not None else 0) + (120 * C if self.position is not None else 0)
        return height * width * total

    def heads(self, x: Tensor) -> Tensor:
        """Read the channels as heads: (B, 8E, H, W) -> (B, 8, N, E)."""
        return x.flatten(2).unflatten(1, [8, x.shape[1] // 8]).transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        check_map(x, self.dim)
        B, _, H, W = x.shape
        qkv = self.qkv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, 3D, H, W)
        parts = qkv.chunk(3, dim=1)
        attending = 4 * self.segment_dim
        q, k, v = parts[0][:, :attending], parts[1][:, :attending], parts[2][:, :attending]  # (B, 8E, H, W)
        if self.aggregate == "qkv":
            q, k, v = self.aggregators(torch.cat([q, k, v])).chunk(3)  # one after another in the batch: joint statistics
        elif self.aggregate == "v":
            v = self.aggregators(v)
        position = torch.zeros_like(v) if self.position is None else self.position(v)
        mixed = attend(self.heads(q), self.heads(k), self.heads(v), self.heads(position), self.scale)  # (B, 8, N, E)
        mixed = mixed.transpose(2, 3).reshape(B, attending, H, W)
        if self.aggregate == "after":
            mixed = self.aggregators(mixed)
        if self.non_attention is not None:
            last = [part[:, attending:] for part in parts]
            mixed = torch.cat([mixed, self.non_attention(torch.cat(last, dim=1))], dim=1)
        return self.proj(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
