"""GroupMixFormer: a hierarchical vision backbone with Group-Mix Attention, in one file.

Paper: "Advancing Vision Transformers with Group-Mix Attention" (Ge et al., 2023), https://arxiv.org/abs/2311.15157

Self-attention compares single tokens. Group-Mix Attention (GMA, Sec. 3) also compares *groups* of tokens: the channels of
Q, K and V are cut into segments, a segment is aggregated over 3 x 3, 5 x 5 or 7 x 7 neighbours into *group proxies*, and
attention runs over single tokens and proxies alike. The attention is factorised, softmax(K)^T V first, so its cost is
linear in the number of tokens.

The function is that of the authors' release, weight for weight. What differs:
- Sizes come from the tensors, so any H, W >= 32 works. The release assumes H and W to be multiples of 32.
- Tokens lie in memory as (B, H, W, D) from stem to head, which PyTorch calls channels_last: convolutions and linear layers
  read the same tensor, and `permute` below is a view. The release copies between two layouts several times a block.
- The four segments that attend are computed side by side: one norm, activation and attention for all of them. The release goes
  through them in turn.
- Modules have the paper's or timm's names. `checkpoint_filter_fn` renames the release's parameters and joins those norms.

Letters: B batch, H x W feature map, N = H * W tokens, D width of a stage, C = D / 5 of a segment, E = D / 10 of a head. Widths
that are no multiple of 10 have E = D / 10, rounded, and C = 2E, and the segment without attention is L = D - 4C wide, else C.
Every module takes and returns (B, D, H, W). `layers.py` has the leaves, `ops/` what computes them fast.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor

from ..ops.attention import attend_heads
from .layers import GELU, BatchNorm2d, Depthwise, Hardswish, LayerNorm2d, check_images, check_map, tokens_as_map
from .mixers import make_blocks
from .pooling import Head

__all__ = ["GroupMixAttention", "GroupMixFormer"]

torch.fx.wrap("check_images")
torch.fx.wrap("check_map")


class SeparableConv(nn.Sequential):
    """Depthwise k x k and pointwise convolution, BN, Hardswish. (B, D_in, H, W) -> (B, D_out, ceil(H/s), ceil(W/s))."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel_size: int, stride: int = 1, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            OrderedDict(
                depthwise=Depthwise(in_dim, kernel_size, stride, **dd),
                pointwise=nn.Conv2d(in_dim, out_dim, 1, bias=False, **dd),
                norm=BatchNorm2d(out_dim, **dd),
                act=Hardswish(),
            )
        )


class NonAttention(nn.Sequential):
    """The branch without attention: mixes the last segments of Q, K and V locally. (B, 3L, H, W) -> (B, L, H, W)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            OrderedDict(
                depthwise=Depthwise(3 * dim, 3, **dd),
                pointwise=nn.Conv2d(3 * dim, dim, 1, bias=False, **dd),
                norm=LayerNorm2d(dim, eps=1e-5, **dd),
                act=Hardswish(),
            )
        )


class GroupAggregators(nn.Module):
    """Turn segments 0 to 3 into group proxies (Sec. 3): single tokens, and groups of 3 x 3, 5 x 5 and 7 x 7.

    A group is aggregated by a depthwise k x k and a pointwise convolution; one BN and one Hardswish follow for all of them.
    """

    def __init__(self, segment_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.depthwise = nn.ModuleList([Depthwise(segment_dim, k, **dd) for k in (3, 5, 7)])
        self.pointwise = nn.ModuleList([nn.Conv2d(segment_dim, segment_dim, 1, bias=False, **dd) for _ in range(3)])
        self.norm = BatchNorm2d(4 * segment_dim, **dd)
        self.act = Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        """Four segments (4, B, C, H, W) -> their proxies side by side (B, 4C, H, W)."""
        segments = x.unbind(0)  # 4 x (B, C, H, W)
        proxies = [segments[0]]
        for i, (depthwise, pointwise) in enumerate(zip(self.depthwise, self.pointwise)):  # noqa: B905 (TorchScript)
            proxies.append(pointwise(depthwise(segments[i + 1])))
        return self.act(self.norm(torch.cat(proxies, dim=1)))


class ConvRelativePosition(nn.Module):
    """Convolution of V for the relative position encoding (CoaT, arXiv 2104.06399). (B, 8E, H, W) -> same.

    Of the 8 heads, 2 have a 3 x 3 kernel per channel, 3 a 5 x 5 and 3 a 7 x 7; other numbers are parted likewise. Segments hold
    2 heads each, so the third segment has one head of 5 x 5 and one of 7 x 7.
    """

    def __init__(self, head_dim: int, heads: int = 8, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        of3, of5 = heads // 4, (heads - heads // 4 + 1) // 2
        self.splits = [of3 * head_dim, of5 * head_dim, (heads - of3 - of5) * head_dim]
        self.conv3, self.conv5, self.conv7 = (Depthwise(n, k, bias=True, **dd) for n, k in zip(self.splits, (3, 5, 7)))  # noqa: B905

    def forward(self, v: Tensor) -> Tensor:
        """Return (B, 8E, H, W)."""
        v3, v5, v7 = v.split(self.splits, dim=1)
        return torch.cat([self.conv3(v3), self.conv5(v5), self.conv7(v7)], dim=1)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Return the kernels of all heads, with zeros around the smaller ones (8E, 1, 7, 7), and the biases (8E)."""
        convs: list[Any] = [self.conv3, self.conv5, self.conv7]
        weights = [F.pad(conv.weight, ((7 - conv.kernel_size[0]) // 2,) * 4) for conv in convs]
        return torch.cat(weights), torch.cat([conv.bias for conv in convs])


class GroupMixAttention(nn.Module):
    """Group-Mix Attention over a feature map (Sec. 3). (B, D, H, W) -> (B, D, H, W).

    Works on any feature map and can stand in for another attention; it has no normalisation before it and no residual.
    Feed it memory in ``torch.channels_last`` to spare a copy. `mixers.group_mix.GroupMix` has options for heads, sizes of
    groups and aggregators.

    Args:
        dim: Width D, at least 10. Five segments, of which four hold two heads each; published widths are multiples of 10, of
            which all segments are equally wide. Of others the last one, without attention, is as wide as the heads leave.

    Raises:
        ValueError: If `dim` is under 10, or the input is not (B, `dim`, H, W) or, with `size`, (B, H * W, `dim`).
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        if dim < 10:
            raise ValueError(f"got dim={dim}, expected at least 10 (5 segments, 8 heads over 4 of them)")
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.head_dim = min(round(dim / 10), (dim - 1) // 8)
        self.segment_dim = 2 * self.head_dim
        self.local_dim = dim - 4 * self.segment_dim
        self.local_heads = 2 if self.local_dim == self.segment_dim else 0  # as wide as so many heads
        self.scale = (dim / 8) ** -0.5  # of the full width, although a head is dim / 10 wide: trained weights rely on it
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.aggregators = GroupAggregators(self.segment_dim, **dd)
        self.non_attention = NonAttention(self.local_dim, **dd)
        self.position = ConvRelativePosition(self.head_dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def group_proxies(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the group proxies of Q, K and V, and the input of the branch without attention.

        Args:
            x: Feature map (B, D, H, W).

        Returns:
            Q, K and V stacked along the batch (3B, 4C, H, W), so that one aggregator serves all three and in training a BN
            sees their joint statistics; channels are 8 heads, two for single tokens and two for each group size. And
            (B, 3L, H, W).
        """
        B, D, H, W = x.shape
        C, L = self.segment_dim, self.local_dim
        qkv = self.qkv(x.permute(0, 2, 3, 1)).view(B, H, W, 3, D)
        groups, local = qkv.split([4 * C, L], dim=4)  # (B, H, W, 3, 4C) and (B, H, W, 3, L)
        groups = groups.unflatten(4, [4, C]).permute(4, 3, 0, 1, 2, 5).contiguous()  # each segment in memory of its own
        local = local.reshape(B, H, W, 3 * L).permute(0, 3, 1, 2)  # (B, 3L, H, W)
        return self.aggregators(groups.view(4, 3 * B, H, W, C).permute(0, 1, 4, 2, 3)), local

    def forward(self, x: Tensor, size: Optional[tuple[int, int]] = None) -> Tensor:  # noqa: UP045 - TorchScript
        """Attend. `x` and the result are (B, D, H, W); with `size`, the height and width of a map, its tokens (B, N, D)."""
        if size is not None:
            x = tokens_as_map(x, self.dim, size)
        check_map(x, self.dim)
        B, D, H, W = x.shape
        proxies, local = self.group_proxies(x)
        position = self.position(proxies[2 * B :])  # of V (B, 8E, H, W)
        qkv = proxies.permute(0, 2, 3, 1).reshape(3, B, H * W, 8, self.head_dim)
        position = position.permute(0, 2, 3, 1).reshape(B, H * W, 8, self.head_dim)
        local = self.non_attention(local).permute(0, 2, 3, 1).reshape(B, H * W, self.local_dim)
        mixed = self.proj(attend_heads(qkv, position, local, self.scale, self.local_heads))  # (B, N, D)
        return mixed.view(B, H, W, D).permute(0, 3, 1, 2) if size is None else mixed


class Mlp(nn.Module):
    """Two linear layers over the channels with GELU (exact, by erf) between. (B, D, H, W) -> (B, D, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        x = x.permute(0, 2, 3, 1)  # (B, H, W, D)
        x = self.fc2(self.act(self.fc1(x)))
        return x.permute(0, 3, 1, 2)  # (B, D, H, W)


class Block(nn.Module):
    """Convolutional position encoding, Group-Mix Attention and MLP, each with a residual. (B, D, H, W) -> same.

    `attn` is another token mixer in place of Group-Mix Attention, if any.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        attn: nn.Module | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe = Depthwise(dim, 3, bias=True, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.attn: Any = GroupMixAttention(dim, **dd) if attn is None else attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        x = x + self.cpe(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class Stem(nn.Module):
    """Two 3 x 3 convolutions of stride 2. (B, in_chans, H, W) -> (B, D, ceil(H/4), ceil(W/4)), channels_last.

    Raises:
        ValueError: If the images do not have `in_chans` channels, a side is under 32, or they are not floating point.
    """

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = BatchNorm2d(dim // 2, **dd)
        self.act1 = Hardswish()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = BatchNorm2d(dim, **dd)
        self.act2 = Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, ceil(H/4), ceil(W/4))."""
        check_images(x, self.in_chans)
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels_last, in words that torch.func.vmap knows
        x = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(x)))


class Stage(nn.Module):
    """Patch embedding, then blocks; no norm after them. (B, D_in, H, W) -> (B, D, ceil(H/s), ceil(W/s))."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        index: int = 0,
        mixer: str = "group_mix",
        mixer_options: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_embed = SeparableConv(in_dim, dim, 3, stride, **dd)
        self.blocks = make_blocks(Block, dim, mlp_ratio, drop_path, index, mixer, mixer_options, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, ceil(H/s), ceil(W/s))."""
        x = self.patch_embed(x)
        return self.blocks(x)


class GroupMixFormer(nn.Module):
    """The network (Sec. 3): a stem and stages at strides 4, 8, 16, 32.

    Args:
        in_chans: Channels of the input images.
        num_classes: Size of the classifier; 0 for none.
        global_pool: Pooling before the classifier: 'avg' (as trained), 'max', 'avgmax', 'catavgmax', 'ggem', 'simpool', or ''
            for none.
        embed_dims: Width of each stage, multiples of 10 in the paper; at least 10.
        depths: Blocks of each stage.
        mlp_ratios: Hidden width of the MLP over the stage's width, per stage.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 over all blocks.
        mixer: What stands in the place of Group-Mix Attention, by its name in `mixers.MIXERS`.
        mixer_options: Options of the mixer.

    Raises:
        ValueError: If the stages' settings differ in number, a width is under 10 (or does not fit another mixer), or there
            is no such mixer or option.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (80, 160, 320, 320),
        depths: Sequence[int] = (2, 4, 12, 4),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mixer: str = "group_mix",
        mixer_options: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not len(embed_dims) == len(depths) == len(mlp_ratios) > 0:
            raise ValueError(
                f"got {len(embed_dims)} embed_dims, {len(depths)} depths and {len(mlp_ratios)} mlp_ratios, "
                "expected one of each per stage"
            )
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.mixer, self.mixer_options = mixer, dict(mixer_options or {})

        self.stem = Stem(in_chans, embed_dims[0], **dd)
        drop_path: list[Any] = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        self.feature_info = []
        in_dim = embed_dims[0]
        for i, (dim, mlp_ratio) in enumerate(zip(embed_dims, mlp_ratios, strict=True)):
            stages.append(Stage(in_dim, dim, 1 if i == 0 else 2, mlp_ratio, drop_path[i], i, mixer, mixer_options, **dd))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(self.num_features, **dd)
        self.head = self._head(num_classes, global_pool, drop_rate, **dd)
        self.apply(self._init_weights)

    @property
    @torch.jit.unused
    def mixer_name(self) -> str:
        """The mixer with its options."""
        return " ".join([self.mixer, *(f"{name}={value}" for name, value in self.mixer_options.items())])

    def _head(self, num_classes: int, pool_type: str, drop_rate: float, **dd: Any) -> Head:
        head = Head(self.num_features, num_classes, pool_type, drop_rate, **dd)
        self.head_hidden_size = self.num_features * head.global_pool.feat_mult()
        return head

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        # Convolutions and norms keep PyTorch's default, as in the release.
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters, other than biases and norms, to keep from weight decay: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.patch_embed", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.blocks.grad_checkpointing = enable  # type: ignore[union-attr]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` (0: none); `global_pool` None keeps the pooling."""
        self.num_classes = num_classes
        pool = self.head.global_pool
        pool_type = pool.pool_type if global_pool is None else global_pool
        weight = self.stem.conv1.weight
        self.head = self._head(num_classes, pool_type, self.head.drop.p, device=weight.device, dtype=weight.dtype)
        if pool_type == pool.pool_type:
            self.head.global_pool = pool  # with what it has learnt
        self.head.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what comes after the last of the stages `indices`; return their positive indices."""
        take_indices, last = feature_take_indices(len(self.stages), indices)
        prune_end = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_end or prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_end:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_end or prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, list[int]]] = None,  # noqa: UP007, UP045 (TorchScript)
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:  # noqa: UP007
        """Return the maps after chosen stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages to return: the last n if an int, all if None.
            norm: Apply the final BN to the last stage's map.
            stop_early: Do not run stages after the last one asked for.
            output_fmt: 'NCHW', the only format.
            intermediates_only: Return only the maps, not the result of `forward_features`.

        Returns:
            The result of `forward_features`, unless left out, and the maps (B, D_i, ceil(H/2^(i+2)), ceil(W/2^(i+2))).
        """
        assert output_fmt == "NCHW", f"output_fmt must be NCHW, not {output_fmt}"
        take_indices, last = feature_take_indices(len(self.stages), indices)
        final = len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a Sequential
            stages = self.stages
        else:
            stages = self.stages[: last + 1]
        stage_index = 0
        for stage_index, stage in enumerate(stages):
            x = stage(x)
            if stage_index in take_indices:
                intermediates.append(self.norm(x) if norm and stage_index == final else x)
        if intermediates_only:
            return intermediates
        if stage_index == final:
            x = self.norm(x)
        return x, intermediates

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> last map after BN (B, D, ceil(H/32), ceil(W/32))."""
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map of `forward_features` -> logits (B, num_classes), or pooled features with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        x = self.forward_features(x)
        return self.forward_head(x)


# Parameter names of the release and here, applied in this order.
_RELEASED_NAMES = (
    (r"^conv_stem\.proj", "stem.conv"),
    (r"^conv_stem\.", "stem."),
    (r"^patch_embed_layers\.(\d+)\.(proj\.)?", r"stages.\1.patch_embed."),
    (r"^groupmixformer_backbone\.(\d+)\.gma_stage\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.cpe\.proj\.", ".cpe."),
    (r"\.att\.aggregator\.agg0\.(conv\.)?", ".attn.non_attention."),
    (r"\.att\.aggregator\.norm(\d)\.", r".attn.aggregators.\1.norm."),
    (r"\.att\.aggregator\.agg(\d)\.", r".attn.aggregators.\1."),
    (r"\.att\.crpe\.conv_list\.0\.", ".attn.position.conv3."),
    (r"\.att\.crpe\.conv_list\.1\.", ".attn.position.conv5."),
    (r"\.att\.crpe\.conv_list\.2\.", ".attn.position.conv7."),
    (r"\.att\.", ".attn."),
    (r"(patch_embed|aggregators\.\d|non_attention)\.conv1\.", r"\1.depthwise."),
    (r"\.pointwise_conv\.", ".pointwise."),
    (r"^norm4\.", "norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def joined_name(name: str) -> str:
    """Return the name of a tensor that was stored, as the release does, with the aggregators of the four segments apart."""
    name = re.sub(r"(^|\.)aggregators\.[0-3]\.norm\.", r"\1aggregators.norm.", name)
    convolution = re.fullmatch(r"(|.*\.)aggregators\.([123])\.(depthwise|pointwise)\.weight", name)
    return name if convolution is None else f"{convolution[1]}aggregators.{convolution[3]}.{int(convolution[2]) - 1}.weight"


def _join_segments(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the norms of the four segments, in their order."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in state_dict.items():
        parts.setdefault(joined_name(name), []).append(tensor)
    counts = [name for name in parts if name.endswith("num_batches_tracked")]
    return {name: tensors[0] if name in counts or len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Rename the parameters of a released checkpoint, or of an early one of this package; leave others as they are.

    Args:
        state_dict: Tensors by name. A released training checkpoint's ``{"model": state_dict, ...}`` is unpacked.
        model: Not needed; timm passes it.
    """
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    if "conv_stem.proj1.weight" in state_dict:
        renamed = {}
        for name, tensor in state_dict.items():
            for pattern, ours in _RELEASED_NAMES:
                name = re.sub(pattern, ours, name)
            renamed[name] = tensor
        state_dict = renamed
    return _join_segments(state_dict)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.875,  # resize to 256, crop 224
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2311.15157",
        "paper_name": "Advancing Vision Transformers with Group-Mix Attention",
        "origin_url": "https://github.com/AILab-CVC/GroupMixFormer",
        **kwargs,
    }


# The release's weights lie behind links that need a browser, so there is no url: see released.py.
default_cfgs = generate_default_cfgs(
    {
        "groupmixformer_mobile": _cfg(),
        "groupmixformer_tiny": _cfg(),
        "groupmixformer_small": _cfg(),
        "groupmixformer_base": _cfg(),
        "groupmixformer_large": _cfg(),
        "groupmixformer_large_384": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
    }
)


# Widths, depths and MLP ratios of the stages.
VARIANTS: dict[str, dict[str, Any]] = {
    "groupmixformer_mobile": {"embed_dims": (40, 80, 160, 160), "depths": (3, 3, 12, 4), "mlp_ratios": (4, 4, 4, 4)},
    "groupmixformer_tiny": {"embed_dims": (80, 160, 200, 240), "depths": (4, 4, 12, 4), "mlp_ratios": (4, 4, 4, 4)},
    "groupmixformer_small": {"embed_dims": (80, 160, 320, 320), "depths": (2, 4, 12, 4), "mlp_ratios": (4, 4, 4, 4)},
    "groupmixformer_base": {"embed_dims": (200, 240, 320, 480), "depths": (8, 8, 12, 8), "mlp_ratios": (2, 2, 4, 4)},
    # As the release configures it, with the remark "need to adjust": 71.8 M parameters and 38.3 GMACs where the paper says
    # 70.3 M and 36.1. `groupmixformer.load_checkpoint` reads the widths and depths from the file instead.
    "groupmixformer_large": {"embed_dims": (240, 320, 360, 480), "depths": (8, 10, 30, 10), "mlp_ratios": (4, 4, 2, 2)},
}
VARIANTS["groupmixformer_large_384"] = VARIANTS["groupmixformer_large"]


def _create_groupmixformer(variant: str, pretrained: bool, **kwargs: Any) -> GroupMixFormer:
    if pretrained and not (kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay")):
        from .checkpoint import downloaded_cfg  # which needs the network

        kwargs["pretrained_cfg_overlay"] = downloaded_cfg(variant)
    model: Any = build_model_with_cfg(
        GroupMixFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**VARIANTS[variant], **kwargs},
    )
    model.pretrained_cfg.pop("state_dict", None)  # they are in the model now
    return model


@register_model
def groupmixformer_mobile(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-M, 5.7 M parameters, 1.4 GMACs at 224."""
    return _create_groupmixformer("groupmixformer_mobile", pretrained, **kwargs)


@register_model
def groupmixformer_tiny(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-T, 11.0 M parameters, 3.7 GMACs at 224."""
    return _create_groupmixformer("groupmixformer_tiny", pretrained, **kwargs)


@register_model
def groupmixformer_small(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-S, 22.4 M parameters, 5.2 GMACs at 224."""
    return _create_groupmixformer("groupmixformer_small", pretrained, **kwargs)


@register_model
def groupmixformer_base(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-B, 45.8 M parameters, 17.6 GMACs at 224."""
    return _create_groupmixformer("groupmixformer_base", pretrained, **kwargs)


@register_model
def groupmixformer_large(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """GroupMixFormer-L as the release configures it, 71.8 M parameters, 38.3 GMACs at 224; see `VARIANTS`."""
    return _create_groupmixformer("groupmixformer_large", pretrained, **kwargs)


@register_model
def groupmixformer_large_384(pretrained: bool = False, **kwargs: Any) -> GroupMixFormer:
    """`groupmixformer_large` for images of 384 x 384."""
    return _create_groupmixformer("groupmixformer_large_384", pretrained, **kwargs)
