"""Attention of super tokens: STViT's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Mixer, SelfAttention, by_stage, heads_of, merge, partition


def _around(x: Tensor) -> Tensor:
    """Return the 3 x 3 super tokens around each, zeros beyond the border. (B, h, w, D) -> (B, h, w, 9, D)."""
    _, h, w, _ = x.shape
    x = F.pad(x, [0, 0, 1, 1, 1, 1])
    return torch.stack([x[:, i // 3 : i // 3 + h, i % 3 : i % 3 + w] for i in range(9)], dim=3)


def _collected(x: Tensor) -> Tensor:
    """Add up what cells give to the 3 x 3 super tokens around: `_around` transposed. (B, h, w, 9, D) -> (B, h, w, D)."""
    total = F.pad(x[:, :, :, 0], [0, 0, 0, 2, 0, 2])
    for i in range(1, 9):
        total = total + F.pad(x[:, :, :, i], [0, 0, i % 3, 2 - i % 3, i // 3, 2 - i // 3])
    return total[:, 1:-1, 1:-1]


class SuperToken(Mixer):
    """Tokens are gathered into super tokens, which attend, and their result is spread: STViT (arXiv 2211.11167, Sec. 3.2).

    A super token starts as the mean of a cell of s x s tokens. Each token is assigned to the 3 x 3 super tokens around its cell
    by a softmax of their products, in one iteration and without gradient. Neighbours beyond the border and padded tokens take
    no part. With s = 1 it is plain self-attention. Written from the definition.

    Cost per token: 27D + (4D^2 + 2(N/s^2)D) / s^2; for s = 1 4D^2 + 2ND.

    Args:
        size: Side s of a cell; by default 8, 4, 1, 1 by stage.
    """

    def __init__(
        self, dim: int, *, stage: int = 0, depth: int = 0, size: int | None = None, head_dim: int = 32, **dd: Any
    ) -> None:
        super().__init__()
        self.dim = dim
        self.size = by_stage((8, 4, 1, 1), stage, size)
        self.attn = SelfAttention(dim, heads_of(dim, head_dim), **dd)

    def _macs(self, height: int, width: int) -> float:
        N, D, s = height * width, self.dim, self.size**2
        return N * ((27 * D if s > 1 else 0) + (4 * D**2 + 2 * N / s * D) / s)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        s = self.size
        if s == 1:
            return self.attn(x.permute(0, 2, 3, 1).reshape(B, H * W, D)).view(B, H, W, D).permute(0, 3, 1, 2)
        h, w = (H + s - 1) // s, (W + s - 1) // s
        cells, inside, _ = partition(x.permute(0, 2, 3, 1), s, s)
        real = inside.view(1, h, w, s * s, 1).to(x.dtype)
        cells = cells.view(B, h, w, s * s, D) * real
        means = cells.sum(3) / real.sum(3)  # (B, h, w, D)
        exists = _around(torch.ones(1, h, w, 1, device=x.device)).transpose(3, 4) > 0  # (1, h, w, 1, 9)
        similarity = cells.detach() @ _around(means.detach()).transpose(3, 4) * D**-0.5  # (B, h, w, s^2, 9)
        affinity = similarity.masked_fill(~exists, float("-inf")).softmax(4) * real
        weight = _collected(affinity.sum(3)[..., None])  # (B, h, w, 1)
        tokens = _collected(affinity.transpose(3, 4) @ cells) / (weight + 1e-12)
        tokens = self.attn(tokens.reshape(B, h * w, D)).view(B, h, w, D)
        x = affinity @ _around(tokens)  # (B, h, w, s^2, D)
        return merge(x.reshape(B * h * w, s * s, D), s, s, H, W).permute(0, 3, 1, 2)
