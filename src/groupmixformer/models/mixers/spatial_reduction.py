"""Keys and values of a reduced map: PVTv2's."""

from typing import Any, Optional

import torch.nn.functional as F
from timm.models.pvt_v2 import Attention
from torch import Tensor

from .base import Mixer, by_stage, heads_of, multi_head


class _Attention(Attention):
    """timm's layer, from its parts, for maps of any size. (B, D, H, W) -> same."""

    def __init__(self, dim: int, heads: int, ratio: int, linear: bool, **dd: Any) -> None:
        super().__init__(dim, heads, ratio, linear, **dd)
        self.ratio = ratio

    def forward(self, x: Tensor, feat_size: Optional[list[int]] = None) -> Tensor:  # noqa: UP045 (TorchScript)
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        r = self.ratio
        q = self.q(x.flatten(2).transpose(1, 2))  # (B, N, D)
        if self.pool is not None and self.sr is not None and self.norm is not None and self.act is not None:
            x = self.act(self.norm(self.sr(self.pool(x)).flatten(2).transpose(1, 2)))  # (B, 49, D)
        elif self.sr is not None and self.norm is not None:
            x = F.pad(x, [0, (W + r - 1) // r * r - W, 0, (H + r - 1) // r * r - H])
            x = self.norm(self.sr(x).flatten(2).transpose(1, 2))  # (B, M, D)
        else:
            x = x.flatten(2).transpose(1, 2)
        k, v = self.kv(x).chunk(2, dim=2)
        x = self.proj(multi_head(q, k, v, self.num_heads))
        return x.view(B, H, W, D).permute(0, 3, 1, 2)


class SpatialReduction(Mixer):
    """K and V from a convolution of stride and side 8, 4, 2, 1 by stage, with LayerNorm: PVTv2 (arXiv 2106.13797, Sec. 3).

    Or, linear, from an adaptive average pool to 7 x 7, a 1 x 1 convolution, LayerNorm and GELU. timm's layers. timm leaves out
    the rows and columns beyond the last whole cell and needs one; here the convolution sees zeros there, as at any border.

    Cost per token at ratio r: 3D^2 + 2D^2/r^2 + 2(N/r^2)D, 4D^2 + 2ND at ratio 1; linear: 2D^2 + 98D + 49 * 3D^2 / N.

    Args:
        ratio: Stride of the reduction; by default 8, 4, 2, 1 by stage.
        linear: Take the linear variant.
    """

    def __init__(
        self,
        dim: int,
        *,
        stage: int = 0,
        depth: int = 0,
        ratio: int | None = None,
        linear: bool = False,
        head_dim: int = 32,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.dim, self.linear = dim, linear
        self.ratio = by_stage((8, 4, 2, 1), stage, ratio)
        self.attn = _Attention(dim, heads_of(dim, head_dim), self.ratio, linear, **dd)

    def _macs(self, height: int, width: int) -> float:
        N, D, r = height * width, self.dim, self.ratio
        M: float = 49 if self.linear else N / r**2
        reduction = D**2 if self.linear else (r**2 * D**2 if r > 1 else 0)
        return N * (2 * D**2 + 2 * M * D) + M * (2 * D**2 + reduction)
