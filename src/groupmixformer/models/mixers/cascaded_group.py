"""Heads that take chunks of the channels, one after another: EfficientViT's."""

from typing import TYPE_CHECKING, Any

import torch
from timm.models.efficientvit_msra import CascadedGroupAttention
from torch import Tensor

from .base import Mixer, additive, heads_of, merge, multi_head, partition


class _Cascade(CascadedGroupAttention):
    """timm's layer on a whole map (B, D, H, W): windows are cut within, so that no norm or convolution meets their padding."""

    attention_bias_idxs: Tensor
    if TYPE_CHECKING:  # TorchScript refuses comments on types
        qkvs: Any
        dws: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        B, _, H, W = x.shape
        window = self.resolution
        bias = self.attention_biases[:, self.attention_bias_idxs]  # (h, T, T)
        chunks = x.chunk(self.num_heads, dim=1)
        feature = chunks[0]
        features: list[Tensor] = []
        for i, (qkv, depthwise) in enumerate(zip(self.qkvs, self.dws)):  # noqa: B905 (TorchScript)
            if i > 0:
                feature = feature + chunks[i]
            q, k, v = qkv(feature).split([self.key_dim, self.key_dim, self.val_dim], dim=1)
            windows, real, _ = partition(q.permute(0, 2, 3, 1), window, window)
            windows = (windows.view(B, -1, window * window, self.key_dim) * real[:, :, None]).view(
                -1, window, window, self.key_dim
            )
            convolved = depthwise.conv(windows.permute(0, 3, 1, 2))
            convolved = convolved.permute(0, 2, 3, 1).flatten(1, 2)
            q = depthwise.bn(merge(convolved, window, window, H, W).permute(0, 3, 1, 2))
            windows, _, seen = partition(torch.cat([q, k, v], dim=1).permute(0, 2, 3, 1), window, window)
            q, k, v = windows.split([self.key_dim, self.key_dim, self.val_dim], dim=2)
            attended = multi_head(q, k, v, 1, additive(bias[i][None, None], seen))
            feature = merge(attended, window, window, H, W).permute(0, 3, 1, 2)
            features.append(feature)
        return self.proj(torch.cat(features, dim=1))


class CascadedGroup(Mixer):
    """Each head gets its chunk of the channels and the result of the head before it: EfficientViT (arXiv 2305.07027, Sec. 3.1).

    Q and K have 16 channels a head; Q passes a depthwise convolution within its window; BN in place of biases; a bias by
    absolute distance; windows of 7; ReLU before the projection. The layers, and so the parameters, are timm's; the cutting into
    windows is ours, as timm's block lets padding be seen.

    Cost per token: D^2 + D(32 + D/h) + 49(16h + D), and 16 k^2 h for the convolution of Q, which the table of costs leaves out.

    Args:
        heads: Number of heads that is wanted; the nearest that divides `dim` is taken.
        kernel: Side k of the convolution of Q.
    """

    def __init__(
        self, dim: int, *, stage: int = 0, depth: int = 0, heads: int = 4, kernel: int = 5, window: int = 7, **dd: Any
    ) -> None:
        super().__init__()
        self.dim, self.kernel, self.window = dim, kernel, window
        self.heads = heads_of(dim, dim / heads)
        ratio: Any = dim / self.heads / 16  # timm says int and computes the width of V from it
        kernels = (kernel,) * self.heads
        self.attn = _Cascade(dim, 16, self.heads, ratio, window, kernels, **dd)

    def _macs(self, height: int, width: int) -> float:
        D, h = self.dim, self.heads
        return height * width * (D**2 + D * (32 + D / h) + self.window**2 * (16 * h + D) + 16 * self.kernel**2 * h)
