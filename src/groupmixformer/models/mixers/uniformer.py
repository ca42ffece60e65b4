"""Convolution early, attention late: UniFormer's."""

from typing import Any

from torch import nn

from ..layers import BatchNorm2d, Depthwise
from .base import Mixer
from .softmax import Softmax


class UniFormer(Mixer):
    """BN, 1 x 1, depthwise 5 x 5, 1 x 1 in the first two stages, then self-attention: UniFormer (arXiv 2201.04676, Sec. 3.2).

    The slot's LayerNorm stays before the BN. Written from the definition.

    Cost per token: 2D^2 + 25D early, 4D^2 + 2ND late.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        if stage < 2:
            before, after = nn.Conv2d(dim, dim, 1, **dd), nn.Conv2d(dim, dim, 1, **dd)
            self.attn = nn.Sequential(BatchNorm2d(dim, **dd), before, Depthwise(dim, 5, bias=True, **dd), after)
        else:
            self.attn = Softmax(dim, head_dim=head_dim, **dd)

    def _macs(self, height: int, width: int) -> float:
        if isinstance(self.attn, Softmax):
            return self.attn.macs(height, width)
        return height * width * (2 * self.dim**2 + 25 * self.dim)
