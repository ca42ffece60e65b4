"""Convolutions before Q, K and V: CvT's."""

from typing import Any

from torch import Tensor, nn

from ..layers import BatchNorm2d, Depthwise
from .base import Mixer, heads_of, multi_head


class ConvProjection(Mixer):
    """A depthwise 3 x 3 and BN before each of Q, K and V, with stride 2 for K and V: CvT (arXiv 2103.15808, Sec. 3.2).

    The scale is D ** -0.5, of the full width, as in the authors' code. Compared in tests with transformers' `CvtSelfAttention`.

    Cost per token: 2.5D^2 + (N/2)D + 13.5D.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads_of(dim, head_dim)
        self.conv_q, self.conv_k, self.conv_v = (
            nn.Sequential(Depthwise(dim, 3, stride, **dd), BatchNorm2d(dim, **dd)) for stride in (1, 2, 2)
        )
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, **dd) for _ in range(4))

    def _macs(self, height: int, width: int) -> float:
        N, D = height * width, self.dim
        M = (height + 1) // 2 * ((width + 1) // 2)
        return N * (2 * D**2 + 2 * M * D + 9 * D) + 2 * M * (D**2 + 9 * D)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        q = self.q(self.conv_q(x).flatten(2).transpose(1, 2))  # (B, N, D)
        k = self.k(self.conv_k(x).flatten(2).transpose(1, 2))  # (B, M, D)
        v = self.v(self.conv_v(x).flatten(2).transpose(1, 2))
        x = self.proj(multi_head(q, k, v, self.heads, None, self.dim**-0.5))
        return x.view(B, H, W, D).permute(0, 3, 1, 2)
