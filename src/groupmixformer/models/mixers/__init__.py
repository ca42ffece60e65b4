"""Token mixers: the rivals of Group-Mix Attention, in the slot that it has in a block.

In every block ``x = x + cpe(x); x = x + drop(mixer(norm1(x))); x = x + drop(mlp(norm2(x)))``. All but the mixer stays, so
networks differ in nothing else. `make_mixer` makes one by its name in `MIXERS`; `base.Mixer` says what each is.
"""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from torch import nn

from ..layers import Blocks

__all__ = ["MIXERS", "make_blocks", "make_mixer", "mixer_class"]

# Name: module and class, imported when it is asked for; where it is from, and whose code computes it.
MIXERS = {
    "group_mix": ("group_mix.GroupMix", "GroupMixFormer, arXiv 2311.15157; ours"),
    "factorised": ("factorised.Factorised", "CoaT, arXiv 2104.06399; timm"),
    "softmax": ("softmax.Softmax", "Attention Is All You Need, arXiv 1706.03762; PyTorch"),
    "window": ("window.Window", "Swin, arXiv 2103.14030; timm"),
    "cross_window": ("cross_window.CrossWindow", "CSWin, arXiv 2107.00652; from the definition"),
    "hilo": ("hilo.HiLo", "LITv2, arXiv 2205.13213; from the definition"),
    "super_token": ("super_token.SuperToken", "STViT, arXiv 2211.11167; from the definition"),
    "cascaded_group": ("cascaded_group.CascadedGroup", "EfficientViT, arXiv 2305.07027; timm"),
    "dual": ("dual.Dual", "DaViT, arXiv 2204.03645; timm"),
    "global_query": ("global_query.GlobalQuery", "GC ViT, arXiv 2206.09959; timm"),
    "conv_projection": ("conv_projection.ConvProjection", "CvT, arXiv 2103.15808; as transformers"),
    "spatial_reduction": ("spatial_reduction.SpatialReduction", "PVTv2, arXiv 2106.13797; timm"),
    "uniformer": ("uniformer.UniFormer", "UniFormer, arXiv 2201.04676; from the definition"),
    "sliced": ("sliced.Sliced", "SReT, arXiv 2111.05297; from the definition"),
    "none": ("metaformer.NoMixer", "IdentityFormer, arXiv 2210.13452; PyTorch"),
    "pool": ("metaformer.Pool", "PoolFormer, arXiv 2111.11418; timm"),
    "conv": ("metaformer.Conv", "ConvNeXt and ConvFormer, arXiv 2201.03545 and 2210.13452; timm"),
    "head_tokens": ("head_tokens.HeadTokens", "DHVT, arXiv 2210.05958; from the definition"),
    "strip": ("reconstructed.Strip", "S2AFormer; reconstructed from the abstract"),
    "pooled_fusion": ("reconstructed.PooledFusion", "MAFormer; reconstructed from the abstract"),
    "latent_window": ("reconstructed.LatentWindow", "FIT; reconstructed from the abstract"),
    "window_conv": ("reconstructed.WindowConv", "CoSwin; reconstructed from the abstract"),
}


def mixer_class(name: str) -> Any:
    """Return the class of a mixer.

    Raises:
        ValueError: If there is none of that name; names the nearest.
    """
    if name not in MIXERS:
        near = get_close_matches(str(name), MIXERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"got mixer={name!r}, expected one of {', '.join(MIXERS)}: the nearest is {near}")
    module, _, attribute = MIXERS[name][0].partition(".")
    return getattr(import_module(f".{module}", __name__), attribute)


def make_mixer(name: str, dim: int, stage: int = 0, depth: int = 0, options: Mapping[str, Any] | None = None, **dd: Any) -> Any:
    """Make a token mixer, (B, D, H, W) -> (B, D, H, W) for any H and W.

    Args:
        name: Of `MIXERS`. `group_mix` without options is the published `GroupMixAttention`.
        dim: Width D.
        stage: Index of the stage, on which sizes of windows, strides and the like depend.
        depth: Index of the block in its stage: where two kinds of block alternate, the second kind is at odd ones.
        options: Of the mixer's class.
        dd: Device and dtype.

    Raises:
        ValueError: If there is no such mixer or option, or `dim` does not fit.
    """
    kind = mixer_class(name)
    known = [option for option in inspect.signature(kind).parameters if option not in ("dim", "stage", "depth", "dd")]
    for option in options or ():
        if option not in known:
            raise ValueError(f"mixer {name} has no option {option}: expected one of {', '.join(known) or 'none'}")
    if name == "group_mix" and not options:
        from ..groupmixformer import GroupMixAttention

        return GroupMixAttention(dim, **dd)
    return kind(dim, stage=stage, depth=depth, **(options or {}), **dd)


def make_blocks(
    block: type[nn.Module],
    dim: int,
    mlp_ratio: float,
    drop_path: Sequence[float],
    stage: int,
    mixer: str,
    options: Mapping[str, Any] | None,
    **dd: Any,
) -> Blocks:
    """Make the blocks of a stage, one for each rate of `drop_path`; `mixer` and the rest as in `make_mixer`."""
    blocks: type[Blocks] = Blocks
    if mixer == "global_query":
        from .global_query import GlobalQueryBlock, GlobalQueryBlocks

        block, blocks = GlobalQueryBlock, GlobalQueryBlocks
    mixers = [make_mixer(mixer, dim, stage, depth, options, **dd) for depth in range(len(drop_path))]
    return blocks(*(block(dim, mlp_ratio, rate, attn, **dd) for rate, attn in zip(drop_path, mixers, strict=True)))
