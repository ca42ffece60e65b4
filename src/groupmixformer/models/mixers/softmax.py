"""Self-attention of all tokens."""

from typing import Any

from torch import Tensor

from .base import Mixer, SelfAttention, heads_of


class Softmax(Mixer):
    """Multi-head self-attention of all tokens: "Attention Is All You Need" (arXiv 1706.03762, Sec. 3.2), by PyTorch.

    Cost per token: 4D^2 + 2ND.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.attn = SelfAttention(dim, heads_of(dim, head_dim), **dd)

    def _macs(self, height: int, width: int) -> float:
        N, D = height * width, self.dim
        return N * (4 * D**2 + 2 * N * D)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        x = self.attn(x.permute(0, 2, 3, 1).reshape(B, H * W, D))
        return x.view(B, H, W, D).permute(0, 3, 1, 2)
