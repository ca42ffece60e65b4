"""Poolings before the classifier that have weights of their own, by the names that `global_pool` takes besides timm's.

A map (B, D, H, W) becomes a vector (B, D).
"""

from typing import Any

import torch
from timm.layers import ClassifierHead, SimPool2d
from torch import Tensor, nn

__all__ = ["POOLINGS", "GGeM", "Head", "SimPool"]


class GGeM(nn.Module):
    """Group generalised mean pooling (Ko et al., 2022, arXiv 2212.04114): a mean of powers, with an exponent for each group.

    Values under 1e-6 count as that. Exponents begin at 3, as those of GeM do.

    Args:
        dim: Width D.
        groups: Of neighbouring channels; 10, as the heads of the network are D / 10 wide.
    """

    pool_type = "ggem"

    def __init__(self, dim: int, groups: int = 10, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dim = dim
        self.p = nn.Parameter(torch.full((min(groups, dim),), 3.0, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D)."""
        width = -(-self.dim // len(self.p))
        p = self.p.float().repeat_interleave(width)[: self.dim]  # (D)
        powers = x.float().clamp(min=1e-6) ** p[:, None, None]
        return powers.mean((2, 3)).pow(1 / p).to(x.dtype)

    def feat_mult(self) -> int:
        """Return the width of the result over that of the map."""
        return 1


class SimPool(SimPool2d):
    """Attention of the mean of a map to its positions (Psomas et al., 2023, arXiv 2309.06891), as timm has it."""

    pool_type = "simpool"

    def feat_mult(self) -> int:
        """Return the width of the result over that of the map."""
        return 1


POOLINGS: dict[str, Any] = {"ggem": GGeM, "simpool": SimPool}


class Head(ClassifierHead):
    """timm's pooling, dropout and classifier, with `POOLINGS` besides its own."""

    def __init__(self, in_features: int, num_classes: int, pool_type: str, drop_rate: float, **dd: Any) -> None:
        super().__init__(in_features, num_classes, "avg" if pool_type in POOLINGS else pool_type, drop_rate, **dd)
        if pool_type in POOLINGS:
            self.global_pool = POOLINGS[pool_type](in_features, **dd)
