"""Self-attention within slices of the sequence: SReT's."""

from typing import Any

from torch import Tensor

from .base import Mixer, SelfAttention, by_stage, heads_of, merge, partition


class Sliced(Mixer):
    """Self-attention in g slices of the row-major sequence: SReT (arXiv 2111.05297, section on group self-attention).

    The authors' second pass, over a random permutation, is left out. Written from the definition.

    Cost per token: 4D^2 + 2(N/g)D.

    Args:
        groups: g; by default 8, 4, 1, 1 by stage.
    """

    def __init__(
        self, dim: int, *, stage: int = 0, depth: int = 0, groups: int | None = None, head_dim: int = 32, **dd: Any
    ) -> None:
        super().__init__()
        self.dim = dim
        self.groups = by_stage((8, 4, 1, 1), stage, groups)
        self.attn = SelfAttention(dim, heads_of(dim, head_dim), **dd)

    def _macs(self, height: int, width: int) -> float:
        N, D = height * width, self.dim
        return N * (4 * D**2 + 2 * N / self.groups * D)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        T = (H * W + self.groups - 1) // self.groups
        slices, _, mask = partition(x.permute(0, 2, 3, 1).reshape(B, 1, H * W, D), 1, T, columns=self.groups)
        x = merge(self.attn(slices, mask), 1, T, 1, H * W, columns=self.groups)
        return x.reshape(B, H, W, D).permute(0, 3, 1, 2)
