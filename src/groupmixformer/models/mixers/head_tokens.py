"""A token for each head beside those of the map: DHVT's."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .base import Mixer, SelfAttention, heads_of


class HeadTokens(Mixer):
    """Self-attention of the tokens and of one token for each head: DHVT (arXiv 2210.05958, section on HI-MHSA).

    A head token is the mean over the map of the channels of its head, brought to D, with LayerNorm, GELU and a learned
    position. DHVT adds the head tokens' mean to its class token; there is none here, so it is added to all: our adaptation.
    Written from the definition.

    Cost per token: 4D^2 + 2(N + h)D. The table of costs leaves out that the h head tokens attend and are projected too: with
    M = N + h in all it is (4D^2 M + 2 M^2 D + D^2) / N.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads_of(dim, head_dim)
        self.to_tokens = nn.Sequential(nn.Linear(dim // self.heads, dim, **dd), nn.LayerNorm(dim, **dd), nn.GELU())
        self.position = nn.Parameter(torch.empty(self.heads, dim, **dd))
        trunc_normal_(self.position, std=0.02)
        self.attn = SelfAttention(dim, self.heads, **dd)

    def _macs(self, height: int, width: int) -> float:
        D, M = self.dim, height * width + self.heads
        return 4 * D**2 * M + 2 * M**2 * D + D**2

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(B, H * W, D)
        means = tokens.mean(dim=1).view(B, self.heads, D // self.heads)
        tokens = self.attn(torch.cat([tokens, self.to_tokens(means) + self.position], dim=1))  # (B, N + h, D)
        x = tokens[:, : H * W] + tokens[:, H * W :].mean(dim=1, keepdim=True)
        return x.view(B, H, W, D).permute(0, 3, 1, 2)
