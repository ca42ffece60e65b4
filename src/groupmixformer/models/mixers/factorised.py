"""Factorised attention without groups: CoaT's, the decisive control of Group-Mix Attention."""

from typing import Any

import torch
from timm.models.coat import ConvRelPosEnc, FactorAttnConvRelPosEnc
from torch import Tensor

from .base import Mixer


class _PositionOfMaps(ConvRelPosEnc):
    """CoaT's position encoding for tokens of a map without the class token that timm's expects before them."""

    def forward(self, q: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """Return Q * conv(V) (B, h, N, E)."""
        B, heads, N, E = v.shape
        maps = v.transpose(2, 3).reshape(B, heads * E, size[0], size[1])
        parts: list[Tensor] = []
        splits = maps.split(self.channel_splits, dim=1)
        for i, conv in enumerate(self.conv_list):
            parts.append(conv(splits[i]))
        return q * torch.cat(parts, dim=1).reshape(B, heads, E, N).transpose(2, 3)


class Factorised(Mixer):
    """scale * Q softmax(K)^T V + Q * CRPE(V) on all channels, softmax over the tokens: CoaT (arXiv 2104.06399).

    It is what Group-Mix Attention is without groups: the same 8 heads, kernels of the position encoding (3, 5 and 7, for 2, 3
    and 3 heads) and scale, no aggregators and no branch beside. timm's layer, without a class token.

    Cost per token: 4D^2 + 2D*D/h, and 30D for the position encoding, which the table of costs leaves out.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, **dd: Any) -> None:
        super().__init__()
        if dim % 8:
            raise ValueError(f"got dim={dim}, expected a multiple of 8, the number of heads")
        self.dim = dim
        position = _PositionOfMaps(dim // 8, 8, {3: 2, 5: 3, 7: 3}, **dd)
        self.attn = FactorAttnConvRelPosEnc(dim, 8, qkv_bias=True, shared_crpe=position, **dd)

    def _macs(self, height: int, width: int) -> float:
        D = self.dim
        return height * width * (4 * D**2 + D**2 / 4 + 30 * D)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        x = self.attn(x.permute(0, 2, 3, 1).reshape(B, H * W, D), (H, W))
        return x.view(B, H, W, D).permute(0, 3, 1, 2)
