"""Mixers without attention: MetaFormer's nulls."""

from typing import Any

from timm.models.metaformer import Pooling, SepConv
from torch import nn

from .base import Mixer


class NoMixer(Mixer):
    """Nothing: tokens do not meet but in the convolutions around. The identity, as IdentityFormer (arXiv 2210.13452).

    Cost per token: 0.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, **dd: Any) -> None:
        super().__init__()
        self.attn = nn.Identity()

    def _macs(self, height: int, width: int) -> float:
        return 0


class Pool(Mixer):
    """Average pool of 3 x 3 minus the identity: PoolFormer (arXiv 2111.11418, Sec. 3.2). timm's layer.

    Cost per token: 9D additions, which are no multiply-accumulates, so `macs` is 0 where the table of costs has 9D.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, **dd: Any) -> None:
        super().__init__()
        self.attn = Pooling()

    def _macs(self, height: int, width: int) -> float:
        return 0


class Conv(Mixer):
    """1 x 1, depthwise 7 x 7 (ConvNeXt's, arXiv 2201.03545), 1 x 1: ConvFormer's mixer (arXiv 2210.13452). timm's layer.

    Cost per token: 49D + 2D^2, at expansion e e(49D + 2D^2).

    Args:
        expansion: Width between the two 1 x 1 over `dim`; 2 in ConvFormer.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, expansion: float = 1, **dd: Any) -> None:
        super().__init__()
        self.dim, self.hidden = dim, int(expansion * dim)
        self.attn = SepConv(dim, expansion, **dd)

    def _macs(self, height: int, width: int) -> float:
        return height * width * self.hidden * (49 + 2 * self.dim)
