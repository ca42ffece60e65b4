"""What a network looks at: the maps that Group-Mix Attention implies without ever forming them, and what speaks for a class."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groupmixformer import Block, GroupMixAttention, GroupMixFormer

GROUP_SIZES = (1, 1, 3, 3, 5, 5, 7, 7)  # of the eight heads: single tokens, then groups of k x k


@dataclass(frozen=True)
class ImpliedAttention:
    """What query tokens take from the values V on a feature map (B, D, H, W), by head, where V is (B, 8, E, H, W).

    Channel c of head h has at a query the sum over all positions of ``maps * V``, plus that over the 7 x 7 positions around it
    of ``local * V``, plus ``constant``. There are no values outside of the map.

    Attributes:
        maps: (B, queries, 8, H, W): the attention, one weight for all channels of a head. A head may subtract.
        local: (B, queries, 8, E, 7, 7): the position encoding, a weight for each channel, from 3 rows above the query and
            3 columns left of it on. Smaller kernels have zeros around them.
        constant: (B, queries, 8, E): the bias of the position encoding.
    """

    maps: Tensor
    local: Tensor
    constant: Tensor


def implied_attention(attention: GroupMixAttention, x: Tensor, queries: Sequence[tuple[int, int]]) -> ImpliedAttention:
    """Weights that each head gives to the values, for some query tokens (Sec. 3).

    The attention ``scale * Q (softmax(K)^T V)`` equals ``A V`` with ``A = scale * Q softmax(K)^T``. Rows of A are formed here,
    each at a cost linear in the number of tokens. The position encoding ``Q * conv(V)`` adds the local part.

    Args:
        attention: The attention module, in eval mode.
        x: Its input (B, D, H, W).
        queries: Row and column of query tokens on the H x W map.
    """
    H, W = x.shape[-2:]
    proxies, _ = attention.group_proxies(x)
    q, k, _ = proxies.flatten(2).unflatten(1, (8, -1)).transpose(2, 3).chunk(3)  # 3 x (B, 8, N, E)
    at_queries = q[:, :, [row * W + column for row, column in queries]]  # (B, 8, queries, E)
    maps = attention.scale * torch.einsum("bhqe,bhne->bqhn", at_queries, k.softmax(dim=2)).unflatten(3, (H, W))
    weight, bias = attention.position.joined()
    local = torch.einsum("bhqe,heyx->bqheyx", at_queries, weight.view(8, -1, 7, 7))
    constant = torch.einsum("bhqe,he->bqhe", at_queries, bias.view(8, -1))
    return ImpliedAttention(maps, local, constant)


def has_attention_maps(model: nn.Module | None) -> TypeGuard[GroupMixFormer]:
    """Say whether a network is a `GroupMixFormer` with Group-Mix Attention as published."""
    return isinstance(model, GroupMixFormer) and model.mixer_name == "group_mix"


def attend(
    model: nn.Module, images: Tensor, queries: Sequence[Sequence[int]], stages: Collection[int] = (2,), block: int = -1
) -> dict[int, ImpliedAttention]:
    """Return what positions of the images attend to, by stage; the network runs once.

    Args:
        model: A `GroupMixFormer` in eval mode.
        images: Normalised images (B, C, H, W).
        queries: Pixels (y, x) of the positions; the tokens that cover them are the queries.
        stages: Stages 0 to 3, with tokens of 4, 8, 16 and 32 pixels.
        block: Block of the stages; the last one by default.

    Raises:
        ValueError: If the model is not a `GroupMixFormer` in eval mode, or a query, stage or block does not exist.
    """
    if not isinstance(model, GroupMixFormer) or model.training:
        state = "in training mode" if isinstance(model, GroupMixFormer) else type(model).__name__
        raise ValueError(f"got a model {state}, expected a GroupMixFormer in eval mode: call model.eval()")
    if not has_attention_maps(model):
        raise ValueError(
            f"got a network with the mixer {model.mixer_name}, expected group_mix as published: only it has these maps"
        )
    network: Any = model.stages
    for stage in stages:
        if not 0 <= stage < len(network):
            raise ValueError(f"got stage {stage}, expected 0 to {len(network) - 1}")
        blocks = network[stage].blocks
        if not -len(blocks) <= block < len(blocks):
            raise ValueError(f"got block {block}, expected 0 to {len(blocks) - 1} in stage {stage}")
        if not isinstance(blocks[block], Block):
            raise ValueError("got a fused model, expected the one that it was made from")
    for y, x in queries:
        if not (0 <= y < images.shape[-2] and 0 <= x < images.shape[-1]):
            raise ValueError(f"got query ({y}, {x}), expected a pixel (y, x) inside {tuple(images.shape[-2:])}")
    found = {}
    features = model.stem(images)
    for stage in range(max(stages) + 1):
        features = network[stage].patch_embed(features)
        blocks = network[stage].blocks
        for index, now in enumerate(blocks):
            if stage in stages and index == block % len(blocks):
                stride = 4 * 2**stage
                tokens = [(y // stride, x // stride) for y, x in queries]
                found[stage] = implied_attention(now.attn, now.norm1(features + now.cpe(features)), tokens)
                if stage == max(stages):
                    break
            features = now(features)
    return found


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
    return attend(model, images, [query], (stage,), block)[stage].maps[:, 0]


def by_group_size(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Magnitude of `attention_maps` per group size, enlarged to the image: (B, 8, h, w) -> (B, 4, H, W), peak 1."""
    strength = maps.abs().unflatten(1, (4, 2)).mean(dim=2)  # (B, 4, h, w)
    strength = strength / strength.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    return F.interpolate(strength, size=tuple(size), mode="bilinear", align_corners=False)


def suited_stage(size: Sequence[int], stages: Iterable[int]) -> int:
    """Return the deepest of `stages` with at least 4 tokens along each side of images (H, W); the first if none has them."""
    stages = sorted(stages)
    return max((stage for stage in stages if min(size) // (4 * 2**stage) >= 4), default=stages[0])


@torch.inference_mode()
def overlays(model: nn.Module, image: Tensor, query: Sequence[int], stage: int | None = None) -> Tensor:
    """Return what one position of an image attends to, to lay over it, for each group size.

    Args:
        model: A `GroupMixFormer` in eval mode.
        image: Normalised (C, H, W), on the model's device.
        query: Pixel (y, x).
        stage: As in `attention_maps`; by default the deepest up to 2 with at least 4 tokens along each side.

    Returns:
        (4, H, W) in 0 to 1, on the CPU: single tokens, groups of 3 x 3, 5 x 5 and 7 x 7.

    Raises:
        ValueError: As `attend` does.
    """
    size = image.shape[-2:]
    maps = attention_maps(model, image[None], query, suited_stage(size, range(3)) if stage is None else stage)
    return by_group_size(maps.float(), size)[0].cpu()


def stages_of(network: Any) -> dict[int, int]:
    """Return the place of the features of each stage, 0 for stride 4, 1 for 8 and so on, among those of a model of timm.

    Args:
        network: A classifier, or the features of one.

    Raises:
        ValueError: If it does not tell of any.
    """
    info = getattr(network, "feature_info", [])
    strides = [each["reduction"] for each in info] if isinstance(info, list) else info.reduction()
    places = {(stride // 4).bit_length() - 1: i for i, stride in enumerate(strides) if stride >= 4}
    if not places:
        raise ValueError(f"{type(network).__name__} has no feature maps whose relevance could be shown")
    return places


def relevance(score: Tensor, features: Tensor, size: Sequence[int], shown: Sequence[int] | None = None) -> Tensor:
    """Return where feature maps speak for a score: activation times gradient, summed over the channels, where that is positive.

    It is Grad-CAM (Selvaraju et al., 2017) with the gradient of each position instead of their mean (HiResCAM, Draelos and
    Carin, 2020), so that what was found in one place does not light up its like elsewhere. On the last stage of a classifier,
    whose pooling gives every position the same gradient, the two are one.

    Args:
        score: A scalar that was computed from `features`: the sum over the images of what to explain.
        features: Maps of a backbone (B, D, h, w).
        size: Height and width of the images that the maps are of.
        shown: The part of them, from the top left corner, to return; all of them by default.

    Returns:
        (B, height, width), enlarged bilinearly: not negative, peak 1; zero everywhere if nothing speaks for the score.

    Raises:
        ValueError: If the score does not depend on the features.
    """
    height, width = size if shown is None else shown
    (gradient,) = torch.autograd.grad(score, features, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("got feature maps that the result was not computed from: this backbone's relevance cannot be shown")
    found = (gradient * features).detach().sum(dim=1, keepdim=True).relu()  # (B, 1, h, w)
    found = F.interpolate(found, tuple(size), mode="bilinear", align_corners=False)[:, 0, :height, :width]
    peak = found.amax(dim=(1, 2), keepdim=True)
    return torch.where(peak > 0, found / peak, 0.0)


def class_relevance(
    model: nn.Module, images: Tensor, classes: Sequence[int] | None = None, stage: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return where images speak for a class of a classifier.

    Args:
        model: A `GroupMixFormer` or another classifier of timm whose features are maps, in eval mode.
        images: Normalised images (B, C, H, W).
        classes: A class for each image; the likeliest by default.
        stage: Stage whose features are weighed: 0 to 3 for strides 4 to 32; by default the deepest with at least 4 tokens
            along each side, which is the last from 128 pixels on.

    Returns:
        The relevance (B, H, W), as `relevance` describes it, and the logits (B, classes).

    Raises:
        ValueError: If the model has no such stage or is in training mode.
    """
    network: Any = model
    if network.training:
        raise ValueError("got a model in training mode, expected one in eval mode: call model.eval()")
    places, size = stages_of(network), images.shape[-2:]
    stage = suited_stage(size, places) if stage is None else stage
    if stage not in places:
        raise ValueError(f"got stage {stage}, expected one of {', '.join(map(str, places))}")
    with torch.enable_grad():
        final, features = network.forward_intermediates(images.detach().requires_grad_())
        logits = network.forward_head(final)
        chosen = logits.argmax(dim=1) if classes is None else torch.tensor(classes, device=logits.device)
        score = logits.gather(1, chosen[:, None]).sum()
    return relevance(score, features[places[stage]], size), logits.detach()
