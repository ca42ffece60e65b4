"""Attention within stripes: CSWin's."""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Depthwise
from .base import Mixer, by_stage, heads_of, merge, multi_head, partition


class _Stripes(nn.Module):
    """Attention within stripes of a part of the heads, with LePE. Q, K, V side by side (B, H, W, 3C) -> (B, H, W, C)."""

    def __init__(self, dim: int, heads: int, h: int, w: int, **dd: Any) -> None:
        super().__init__()
        self.heads, self.h, self.w = heads, h, w
        self.position = Depthwise(dim, 3, bias=True, **dd)

    def forward(self, qkv: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        _, H, W, _ = qkv.shape
        h, w = H if self.h == 0 else self.h, W if self.w == 0 else self.w
        stripes, real, mask = partition(qkv, self.h, self.w)
        q, k, v = stripes.chunk(3, dim=2)  # (B * n, T, C)
        attended = multi_head(q, k, v, self.heads, mask)
        n, T, C = v.shape
        inside = (v.view(-1, real.shape[0], T, C) * real[:, :, None]).view(n, h, w, C)  # the kernel sees zeros beyond a stripe
        position = self.position(inside.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(n, T, C)
        return merge(attended + position, self.h, self.w, H, W)


class CrossWindow(Mixer):
    """Half of the heads in vertical stripes (H x sw), half in horizontal ones (sw x W): CSWin (arXiv 2107.00652, Sec. 3.2).

    Position is told by LePE: a depthwise 3 x 3 of V inside each stripe, added. In the last stage a stripe is the whole map, for
    all heads. Written from the definition.

    Cost per token: 4D^2 + D sw (H + W) + 9D; in the last stage 4D^2 + 2ND + 9D.

    Args:
        stripe: Width of a stripe; by default 1, 2, 7, 7 by stage. 0 for the whole map, as the last stage has it.
    """

    def __init__(
        self, dim: int, *, stage: int = 0, depth: int = 0, stripe: int | None = None, head_dim: int = 32, **dd: Any
    ) -> None:
        super().__init__()
        self.dim = dim
        self.stripe = by_stage((1, 2, 7, 0), stage, stripe)
        heads = heads_of(dim, head_dim, multiple=2)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        if self.stripe == 0:
            self.branches = nn.ModuleList([_Stripes(dim, heads, 0, 0, **dd)])
        else:
            shapes = ((0, self.stripe), (self.stripe, 0))
            self.branches = nn.ModuleList([_Stripes(dim // 2, heads // 2, *shape, **dd) for shape in shapes])
        self.proj = nn.Linear(dim, dim, **dd)

    def _macs(self, height: int, width: int) -> float:
        N, D = height * width, self.dim
        return N * (4 * D**2 + 9 * D + (D * self.stripe * (height + width) if self.stripe else 2 * N * D))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        n = len(self.branches)
        qkv = self.qkv(x.permute(0, 2, 3, 1)).view(B, H, W, 3, n, D // n)
        parts: list[Tensor] = []
        for i, branch in enumerate(self.branches):
            parts.append(branch(qkv[:, :, :, :, i].flatten(3)))
        return self.proj(torch.cat(parts, dim=3)).permute(0, 3, 1, 2)
