"""Attention over space and over channels in turn: DaViT's."""

from typing import Any

from timm.models.davit import ChannelAttention, WindowAttention
from torch import Tensor

from .base import Mixer, heads_of, merge, multi_head, partition


class Dual(Mixer):
    """Windows of 7 x 7 in even blocks, attention of channels to channels in odd ones: DaViT (arXiv 2204.03645, Sec. 3).

    timm's layers; in the windows padded keys are masked, which timm's block does not do.

    Cost per token: 4D^2 + 98D in windows; 4D^2 + 2D*D/h over channels.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, window: int = 7, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.dim, self.heads, self.window = dim, heads_of(dim, head_dim), window
        self.over_channels = depth % 2 == 1
        self.attn: Any = (
            ChannelAttention(dim, self.heads, qkv_bias=True, **dd)
            if self.over_channels
            else WindowAttention(dim, (window, window), self.heads, **dd)
        )

    def _macs(self, height: int, width: int) -> float:
        D = self.dim
        return height * width * (4 * D**2 + 2 * D * (D / self.heads if self.over_channels else self.window**2))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        x = x.permute(0, 2, 3, 1)
        if self.over_channels:
            x = self.attn(x.reshape(B, H * W, D)).view(B, H, W, D)
        else:
            windows, _, mask = partition(x, self.window, self.window)
            q, k, v = self.attn.qkv(windows).chunk(3, dim=2)
            windows = self.attn.proj(multi_head(q, k, v, self.heads, mask))
            x = merge(windows, self.window, self.window, H, W)
        return x.permute(0, 3, 1, 2)
