"""Attention within shifted windows: Swin's."""

from typing import Any

from timm.models.swin_transformer import WindowAttention
from torch import Tensor

from .base import Mixer, additive, heads_of, merge, multi_head, partition


class Window(Mixer):
    """Windows of 7 x 7, shifted by 3 in odd blocks, with a bias by relative position: Swin (arXiv 2103.14030, Sec. 3.2).

    timm's `WindowAttention`; what may be seen is told by a mask of ours, as timm's own block lets padding be seen. A side of
    the map within one window is not shifted.

    Cost per token: 4D^2 + 98D.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, window: int = 7, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.dim, self.window = dim, window
        self.shift = window // 2 if depth % 2 else 0
        self.attn = WindowAttention(dim, heads_of(dim, head_dim), window_size=window, **dd)

    def _macs(self, height: int, width: int) -> float:
        return height * width * (4 * self.dim**2 + 2 * self.window**2 * self.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        return self._windows(x)

    def _windows(self, x: Tensor) -> Tensor:  # TorchScript has no super()
        _, _, H, W = x.shape
        windows, _, seen = partition(x.permute(0, 2, 3, 1), self.window, self.window, self.shift)
        q, k, v = self.attn.qkv(windows).chunk(3, dim=2)
        mask = additive(self.attn._get_rel_pos_bias(), seen)
        windows = self.attn.proj(multi_head(q, k, v, self.attn.num_heads, mask))
        return merge(windows, self.window, self.window, H, W, self.shift).permute(0, 3, 1, 2)
