"""High and low frequencies apart: LITv2's HiLo."""

from typing import Any

import torch
from torch import Tensor, nn

from .base import Mixer, by_stage, cell_means, heads_of, merge, multi_head, partition


class HiLo(Mixer):
    """Some heads within small windows, the others on pooled keys and values: LITv2 (arXiv 2205.13213, section on HiLo).

    High frequencies: softmax inside windows of ws x ws. Low: every token asks, the means of the windows answer. Each has its
    own projection; there is no joint one. With ws 1 all heads are low, which is plain self-attention. LITv2 has attention
    (ws 2 and 1) in its last two stages alone; the first two have windows of 8 and 4 here. Written from the definition.

    Cost per token at alpha 0.5: 2.5D^2 + D^2/ws^2 + ws^2 D + ND/ws^2, which is 2.75D^2 + 4D + ND/4 at ws 2.

    Args:
        alpha: Share of the heads for low frequencies.
        window: ws; by default 8, 4, 2, 1 by stage.
    """

    def __init__(
        self,
        dim: int,
        *,
        stage: int = 0,
        depth: int = 0,
        alpha: float = 0.5,
        window: int | None = None,
        head_dim: int = 32,
        **dd: Any,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"got alpha={alpha}, expected a share of the heads from 0 to 1")
        self.dim = dim
        self.window = by_stage((8, 4, 2, 1), stage, window)
        heads = heads_of(dim, head_dim, multiple=2)
        self.low_heads = heads if self.window == 1 else round(heads * alpha)
        self.high_heads = heads - self.low_heads
        self.low, self.high = (n * (dim // heads) for n in (self.low_heads, self.high_heads))  # widths
        self.high_qkv = nn.Linear(dim, 3 * self.high, **dd) if self.high else None
        self.high_proj = nn.Linear(self.high, self.high, **dd) if self.high else None
        self.low_q = nn.Linear(dim, self.low, **dd) if self.low else None
        self.low_kv = nn.Linear(dim, 2 * self.low, **dd) if self.low else None
        self.low_proj = nn.Linear(self.low, self.low, **dd) if self.low else None

    def _macs(self, height: int, width: int) -> float:
        N, D, low, high, s = height * width, self.dim, self.low, self.high, self.window**2
        return N * (3 * D * high + 2 * s * high + high**2 + D * low * (1 + 2 / s) + 2 * N * low / s + low**2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        x = x.permute(0, 2, 3, 1)  # (B, H, W, D)
        B, H, W, _ = x.shape
        parts: list[Tensor] = []
        if self.high_qkv is not None and self.high_proj is not None:
            windows, _, mask = partition(self.high_qkv(x), self.window, self.window)
            q, k, v = windows.chunk(3, dim=2)
            attended = multi_head(q, k, v, self.high_heads, mask)
            parts.append(self.high_proj(merge(attended, self.window, self.window, H, W)))
        if self.low_q is not None and self.low_kv is not None and self.low_proj is not None:
            k, v = self.low_kv(cell_means(x, self.window)).flatten(1, 2).chunk(2, dim=2)
            attended = multi_head(self.low_q(x).reshape(B, H * W, self.low), k, v, self.low_heads)
            parts.append(self.low_proj(attended).view(B, H, W, self.low))
        return torch.cat(parts, dim=3).permute(0, 3, 1, 2)
