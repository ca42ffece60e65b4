"""Mixers known from abstracts only, reconstructed from these: what they are said to do, with sizes of our own choice."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..layers import Depthwise
from .base import Mixer, SelfAttention, average_to, by_stage, heads_of, merge, multi_head, partition
from .window import Window


class Strip(Mixer):
    """K, V from a strided depthwise convolution, Q and K of one channel a head. Reconstructed from the abstract of S2AFormer.

    The convolution has side 2r - 1 and stride r. S2AFormer: arXiv 2505.22195.

    Cost per token: D^2 + Dh + (Dh + D^2 + (2r - 1)^2 D + N(h + D)) / r^2.

    Args:
        ratio: Stride r; by default 8, 4, 2, 1 by stage.
        head_dim: Width of a head of V that is wanted; the nearest that divides `dim` is taken.
    """

    def __init__(
        self, dim: int, *, stage: int = 0, depth: int = 0, ratio: int | None = None, head_dim: int = 32, **dd: Any
    ) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads_of(dim, head_dim)
        self.ratio = by_stage((8, 4, 2, 1), stage, ratio)
        self.reduce = Depthwise(dim, 2 * self.ratio - 1, self.ratio, bias=True, **dd)
        self.q, self.k = nn.Linear(dim, self.heads, **dd), nn.Linear(dim, self.heads, **dd)
        self.v, self.proj = nn.Linear(dim, dim, **dd), nn.Linear(dim, dim, **dd)

    def _macs(self, height: int, width: int) -> float:
        N, D, h, r = height * width, self.dim, self.heads, self.ratio
        return N * (D**2 + D * h + (D * h + D**2 + (2 * r - 1) ** 2 * D + N * (h + D)) / r**2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        reduced = self.reduce(x).flatten(2).transpose(1, 2)  # (B, M, D)
        q = self.q(x.flatten(2).transpose(1, 2))  # (B, N, h)
        x = self.proj(multi_head(q, self.k(reduced), self.v(reduced), self.heads))
        return x.view(B, H, W, D).permute(0, 3, 1, 2)


class PooledFusion(Mixer):
    """Windows, and a global branch of pooled tokens, fused by cross-attention. Reconstructed from the abstract of MAFormer.

    The result of windows of 7 x 7 asks 7 x 7 tokens pooled from the whole map; the answer is added before the projection.
    MAFormer: arXiv 2209.01620.

    Cost per token: 5D^2 + 196D + 98D^2/N.

    Args:
        window: Side of a window, and of the pooled map.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, window: int = 7, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.dim, self.heads, self.window = dim, heads_of(dim, head_dim), window
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.global_q, self.global_kv = nn.Linear(dim, dim, **dd), nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def _macs(self, height: int, width: int) -> float:
        N, D, T = height * width, self.dim, self.window**2
        return N * (5 * D**2 + 4 * T * D) + 2 * T * D**2

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        pooled = average_to(x, self.window).flatten(2).transpose(1, 2)  # (B, T, D)
        windows, _, mask = partition(self.qkv(x.permute(0, 2, 3, 1)), self.window, self.window)
        q, k, v = windows.chunk(3, dim=2)
        windows = multi_head(q, k, v, self.heads, mask)
        local = merge(windows, self.window, self.window, H, W).reshape(B, H * W, D)
        k, v = self.global_kv(pooled).chunk(2, dim=2)
        x = self.proj(local + multi_head(self.global_q(local), k, v, self.heads))
        return x.view(B, H, W, D).permute(0, 3, 1, 2)


class LatentWindow(Mixer):
    """Windows with a few latents each, which attend to each other. Reconstructed from the abstract of FIT.

    The latents, learned and the same for all windows, ask the tokens of their window; those of all windows attend to each
    other; then every token attends to its window and to the latents of it. FIT: arXiv 2305.12689.

    Cost per token: 4D^2 + 98D + 4mD + (m/49)(6D^2 + 2nmD) for n windows.

    Args:
        latents: m, latents of a window.
    """

    def __init__(
        self, dim: int, *, stage: int = 0, depth: int = 0, latents: int = 4, window: int = 7, head_dim: int = 32, **dd: Any
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.window, self.latents = dim, heads_of(dim, head_dim), window, latents
        self.latent = nn.Parameter(torch.empty(latents, dim, **dd))
        trunc_normal_(self.latent, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.mix = SelfAttention(dim, self.heads, **dd)
        self.latent_kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def _macs(self, height: int, width: int) -> float:
        N, D, T, m = height * width, self.dim, self.window**2, self.latents
        return N * (4 * D**2 + 2 * T * D + 4 * m * D + m / T * (6 * D**2 + 2 * N / T * m * D))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, D, H, W = x.shape
        m = self.latents
        windows, real, mask = partition(self.qkv(x.permute(0, 2, 3, 1)), self.window, self.window)
        n = real.shape[0]
        q, k, v = windows.chunk(3, dim=2)  # (B * n, T, D)
        to_latents = real[:, None, None, :].repeat(B, 1, m, 1)  # (B * n, 1, m, T)
        latents = multi_head(self.latent.expand(B * n, m, D), k, v, self.heads, to_latents)
        latents = self.mix(latents.reshape(B, n * m, D))
        latent_k, latent_v = self.latent_kv(latents).view(B * n, m, 2 * D).chunk(2, dim=2)
        if mask is not None:
            mask = F.pad(mask, [0, m], value=True)
        k, v = torch.cat([k, latent_k], dim=1), torch.cat([v, latent_v], dim=1)  # (B * n, T + m, D)
        x = self.proj(merge(multi_head(q, k, v, self.heads, mask), self.window, self.window, H, W))
        return x.permute(0, 3, 1, 2)


class WindowConv(Window):
    """Swin's shifted windows and a depthwise 3 x 3 beside them, added. Reconstructed from the abstract of CoSwin.

    CoSwin: arXiv 2509.08959.

    Cost per token: 4D^2 + 98D + 9D.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, window: int = 7, head_dim: int = 32, **dd: Any) -> None:
        super().__init__(dim, stage=stage, depth=depth, window=window, head_dim=head_dim, **dd)
        self.conv = Depthwise(dim, 3, bias=True, **dd)

    def _macs(self, height: int, width: int) -> float:
        return super()._macs(height, width) + 9 * height * width * self.dim

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        return self._windows(x) + self.conv(x)
