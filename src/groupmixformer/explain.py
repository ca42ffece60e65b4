"""What a position attends to: the maps that Group-Mix Attention implies without ever forming them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groupmixformer import Block, GroupMixAttention, GroupMixFormer

GROUP_SIZES = (1, 1, 3, 3, 5, 5, 7, 7)  # of the eight heads: single tokens, then groups of k x k


def implied_attention(attention: GroupMixAttention, x: Tensor, query: tuple[int, int]) -> Tensor:
    """Weights that each head gives to the value at every position, for one query token (Sec. 3).

    The attention ``scale * Q (softmax(K)^T V)`` equals ``A V`` with ``A = scale * Q softmax(K)^T``. One row of A is
    formed here, at a cost linear in the number of tokens. The position encoding is a convolution of V and adds a local part,
    which `A` leaves out.

    Args:
        attention: The attention module, in eval mode.
        x: Its input (B, D, H, W).
        query: Row and column of the query token on the H x W map.

    Returns:
        (B, 8, H, W). The sign is that of the weight: a head may subtract.
    """
    B, _, H, W = x.shape
    proxies, _ = attention.group_proxies(x)
    maps = []
    for qkv in proxies:
        q, k, _ = qkv.unflatten(1, (2, attention.head_dim)).chunk(3)  # 3 x (B, 2, D/10, H, W)
        weights = k.flatten(3).softmax(dim=-1)  # (B, 2, D/10, N)
        at_query = q[..., query[0], query[1]].unsqueeze(2)  # (B, 2, 1, D/10)
        maps.append(attention.scale * (at_query @ weights))  # (B, 2, 1, N)
    return torch.cat(maps, dim=1).view(B, 8, H, W)


def attention_maps(model: nn.Module, images: Tensor, query: Sequence[int], stage: int = 2, block: int = -1) -> Tensor:
    """Return what one position of the images attends to, per head.

    Args:
        model: A `GroupMixFormer` in eval mode.
        images: Normalised images (B, C, H, W).
        query: Pixel (y, x) of the position; the token that covers it is the query.
        stage: Stage 0 to 3, with tokens of 4, 8, 16 and 32 pixels.
        block: Block of the stage; the last one by default.

    Returns:
        (B, 8, ceil(H / s), ceil(W / s)) for a stage of stride s: heads 0-1 compare single tokens, 2-3 groups of 3 x 3, 4-5 of
        5 x 5 and 6-7 of 7 x 7 tokens (`GROUP_SIZES`). Weights are signed and do not sum to 1.

    Raises:
        ValueError: If the model is not a `GroupMixFormer` in eval mode, or the query, stage or block does not exist.
    """
    if not isinstance(model, GroupMixFormer) or model.training:
        state = "in training mode" if isinstance(model, GroupMixFormer) else type(model).__name__
        raise ValueError(f"got a model {state}, expected a GroupMixFormer in eval mode: call model.eval()")
    stages: Any = model.stages
    if not 0 <= stage < len(stages):
        raise ValueError(f"got stage {stage}, expected 0 to {len(stages) - 1}")
    blocks = stages[stage].blocks
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f"got block {block}, expected 0 to {len(blocks) - 1} in stage {stage}")
    if not isinstance(blocks[block], Block):
        raise ValueError("got a fused model, expected the one that it was made from")
    y, x = query
    if not (0 <= y < images.shape[-2] and 0 <= x < images.shape[-1]):
        raise ValueError(f"got query ({y}, {x}), expected a pixel (y, x) inside {tuple(images.shape[-2:])}")
    features = model.stem(images)
    for earlier in stages[:stage]:
        features = earlier(features)
    features = stages[stage].patch_embed(features)
    index = block % len(blocks)
    for earlier in blocks[:index]:
        features = earlier(features)
    chosen = blocks[index]
    features = chosen.norm1(features + chosen.cpe(features))
    stride = 4 * 2**stage
    return implied_attention(chosen.attn, features, (y // stride, x // stride))


def by_group_size(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Magnitude of `attention_maps` per group size, enlarged to the picture: (B, 8, h, w) -> (B, 4, H, W), peak 1."""
    strength = maps.abs().unflatten(1, (4, 2)).mean(dim=2)  # (B, 4, h, w)
    strength = strength / strength.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    return F.interpolate(strength, size=tuple(size), mode="bilinear", align_corners=False)
