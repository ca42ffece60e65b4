"""What the operations of Group-Mix Attention compute, in plain PyTorch: their definition, on every device.

Letters: B batch, N tokens, E width of a head.
"""

import torch
from torch import Tensor

__all__ = ["attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attend by factorised attention with position encoding (Sec. 3): scale * Q softmax(K)^T V + Q * position.

    The softmax is taken over the tokens, and K and V meet first, so the cost is linear in N.

    Args:
        q: Queries (..., N, E).
        k: Keys, likewise.
        v: Values, likewise.
        position: The relative position encoding of the values, likewise.
        scale: Factor of the attention, not of the position encoding.
        mask: Where several heads lie side by side in E, 1 within a head and 0 between two (E, E): one product serves them all.

    Returns:
        (..., N, E).
    """
    context = scale * (k.softmax(dim=-2).transpose(-2, -1) @ v)  # (..., E, E)
    if mask is not None:
        context = context * mask
    return torch.addcmul(q @ context, q, position)
