"""Keys and values of a reduced map: PVTv2's."""

from typing import Any

import torch.nn.functional as F
from timm.models.pvt_v2 import Attention
from torch import Tensor

from .base import Mixer, by_stage, heads_of, multi_head


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
        self.attn = Attention(dim, heads_of(dim, head_dim), self.ratio, linear, **dd)

    def _macs(self, height: int, width: int) -> float:
        N, D, r = height * width, self.dim, self.ratio
        M: float = 49 if self.linear else N / r**2
        reduction = D**2 if self.linear else (r**2 * D**2 if r > 1 else 0)
        return N * (2 * D**2 + 2 * M * D) + M * (2 * D**2 + reduction)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        attn, r = self.attn, self.ratio
        q = attn.q(x.flatten(2).transpose(1, 2))  # (B, N, D)
        if attn.pool is not None and attn.sr is not None and attn.norm is not None and attn.act is not None:
            x = attn.act(attn.norm(attn.sr(attn.pool(x)).flatten(2).transpose(1, 2)))  # (B, 49, D)
        elif attn.sr is not None and attn.norm is not None:
            x = F.pad(x, [0, (W + r - 1) // r * r - W, 0, (H + r - 1) // r * r - H])
            x = attn.norm(attn.sr(x).flatten(2).transpose(1, 2))  # (B, M, D)
        else:
            x = x.flatten(2).transpose(1, 2)
        k, v = attn.kv(x).chunk(2, dim=2)
        x = attn.proj(multi_head(q, k, v, attn.num_heads))
        return x.view(B, H, W, D).permute(0, 3, 1, 2)
