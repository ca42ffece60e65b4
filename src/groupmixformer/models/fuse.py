"""The exact inference form: the same function to rounding, with what does not depend on the image worked out beforehand.

What is folded:
- BN into the convolution or linear layer before it, that of the first segment into its rows of the layer for Q, K and V.
- LayerNorm's weight and bias into the linear layer after it.
- The residual of the convolutional position encoding into the centre of its kernel.
- The scale of the attention and the mask that keeps heads apart into one matrix, the kernels of the relative position encoding
  into one 7 x 7 per channel.
- The order of the rows that make Q, K and V: a segment comes out of a product of its own, Q, K and V of a token side by side,
  so that an aggregator reads and writes one tensor and nothing is permuted. Where there are kernels for a GPU, one product
  makes all segments, and they read it where it lies.
- An activation into the linear layer before it, by oneDNN on a CPU, where it is large.
- LoRA into the weights that it adapts. AdaptFormer's layers stay, and so do the MLP and the norms of their block.

The BN before the head stays: `forward_features` returns what it makes.

Letters are those of `groupmixformer`: B batch, H x W map, N = H * W tokens, D width, C = D / 5 width of a segment.
"""

import copy
from collections import Counter
from itertools import pairwise
from typing import Any, Self

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ..ops import attention as ops
from ..ops import dispatch
from ..ops.onednn import linear
from . import groupmixformer as network
from . import layers
from .adapters import AdaptFormer, merge_lora
from .groupmixformer import Block, GroupMixAttention, SeparableConv, Stem
from .layers import check_images, check_map, tokens_as_map
from .mixers.base import Mixer


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what a BN in eval mode multiplies by and what it adds, in float64."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _conv_with_norm(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    """Return the convolution with the BN after it folded in."""
    assert isinstance(conv, nn.Conv2d)
    scale, shift = _scale_and_shift(norm)
    folded = copy.deepcopy(conv)
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    folded.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(conv.weight))
    folded.bias = nn.Parameter(bias.to(conv.weight))
    return folded


def _linear_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    if weight.device.type == "cpu":
        weight = weight.t().contiguous().t()  # by columns, which spares oneDNN rearranging it in each product
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def _linear_with_norm(pointwise: nn.Module, norm: nn.Module) -> nn.Linear:
    """Return a pointwise convolution, with the BN after it folded in, as a linear layer."""
    conv = _conv_with_norm(pointwise, norm)
    assert conv.bias is not None
    return _linear_layer(conv.weight.flatten(1), conv.bias)


def _after_norm(weight: Tensor, bias: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
    """Return weight and bias, in float64, of a linear layer that takes over those of the LayerNorm before it."""
    weight, bias = weight.double(), bias.double()
    if norm is None:
        return weight, bias
    return weight * norm.weight.double(), bias + weight @ norm.bias.double()


class Fused(nn.Module):
    """What `fuse` puts in a module's place."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode.

        Raises:
            ValueError: If training is asked for.
        """
        if mode:
            raise ValueError("a fused model is for inference: train the model that it was made from, and fuse it again")
        return super().train(mode)


class FusedStem(Fused):
    """Two convolutions of stride 2 with Hardswish. (B, in_chans, H, W) -> (B, D, ceil(H/4), ceil(W/4)), channels_last."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.in_chans = stem.in_chans
        self.conv1, self.conv2 = _conv_with_norm(stem.conv1, stem.norm1), _conv_with_norm(stem.conv2, stem.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, ceil(H/4), ceil(W/4))."""
        check_images(x, self.in_chans)
        x = F.hardswish(self.conv1(x.contiguous(memory_format=torch.channels_last)), inplace=True)
        return F.hardswish(self.conv2(x), inplace=True)


class FusedSeparableConv(Fused):
    """Depthwise and pointwise convolution and Hardswish. (B, D_in, H, W) -> (B, D_out, ceil(H/s), ceil(W/s))."""

    def __init__(self, module: SeparableConv) -> None:
        super().__init__()
        self.depthwise, pointwise, norm, _ = module
        self.pointwise = _linear_with_norm(pointwise, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D_out, ceil(H/s), ceil(W/s))."""
        x = self.depthwise(x).permute(0, 2, 3, 1)  # (B, H, W, D_in)
        return linear(x, self.pointwise.weight, self.pointwise.bias, "hardswish").permute(0, 3, 1, 2)


class FusedAttention(Fused):
    """Group-Mix Attention with the LayerNorm before it, if any. (B, H, W, D) -> (B, H, W, D)."""

    mask: Tensor  # (C, C): 1 within a head, 0 between the two
    kernel_weights: Tensor  # (T, C): of the aggregators and
    position_weights: Tensor  # of the position encoding, as `ops` takes them

    def __init__(self, attention: GroupMixAttention, norm: nn.LayerNorm | None = None) -> None:
        super().__init__()
        D, C = attention.dim, attention.segment_dim
        self.dim, self.segment_dim, self.eps = D, C, None if norm is None else norm.eps
        aggregators = attention.aggregators
        scale, shift = _scale_and_shift(aggregators.norm)  # (4C)
        like = attention.qkv.weight
        weight, bias = _after_norm(like, attention.qkv.bias, norm)
        # Rows by segment, each a layer of its own, then Q, K, V, then channel.
        widths = [C, C, C, C, attention.local_dim]
        weights, biases = list(weight.view(3, D, D).split(widths, dim=1)), list(bias.view(3, D).split(widths, dim=1))
        weights[0], biases[0] = weights[0] * scale[:C, None], biases[0] * scale[:C] + shift[:C]
        rows = [(w.flatten(0, 1).to(like), b.flatten().to(like)) for w, b in zip(weights, biases, strict=True)]
        self.with_kernels = attention.local_dim == C <= dispatch.MAX_SEGMENT_DIM and dispatch.kernels_available(like)
        if self.with_kernels:
            rows = [(torch.cat([w for w, _ in rows]), torch.cat([b for _, b in rows]))]
        self.qkv = nn.ModuleList(_linear_layer(w, b) for w, b in rows)
        pointwise_layers: list[Any] = [*aggregators.pointwise]
        pointwise = torch.cat([layer.weight for layer in pointwise_layers]).flatten(1).double() * scale[C:, None]
        folded = zip(pointwise.to(like).split(C), shift[C:].to(like).split(C), strict=True)
        self.pointwise = nn.ModuleList(_linear_layer(w, b) for w, b in folded)
        depthwise_layers: list[Any] = [*aggregators.depthwise]
        depthwise = [layer.weight for layer in depthwise_layers]
        self.depthwise = nn.ParameterList(w.repeat(3, 1, 1, 1) for w in depthwise)  # (3C, 1, k, k), the same for Q, K and V
        self.position = nn.Conv2d(4 * C, 4 * C, 7, padding=3, groups=4 * C, device="meta")
        self.position.weight, self.position.bias = (nn.Parameter(part) for part in attention.position.joined())
        if self.with_kernels:  # made here, as making them takes operations in each forward pass
            self.register_buffer("kernel_weights", ops.join_kernels(depthwise))
            position = [
                weight[..., (7 - k) // 2 : (7 + k) // 2, (7 - k) // 2 : (7 + k) // 2]  # without the zeros around
                for weight, k in zip(self.position.weight.split(C), ops.POSITION_SIZES, strict=True)
            ]
            self.register_buffer("position_weights", ops.join_kernels(position))
        self.scale = attention.scale
        self.register_buffer("mask", ops.within_heads(C, like))
        # The branch without attention takes Q, K and V of the last segment side by side, which is how they come.
        self.non_attention = attention.non_attention
        self.proj = _linear_layer(attention.proj.weight, attention.proj.bias)

    def segments(self, x: Tensor) -> list[Tensor]:
        """Return Q, K and V side by side, by segment, the first with its activation. 4 x (B, H, W, 3C) and (B, H, W, 3L)."""
        layers: list[Any] = [*self.qkv]
        single, *others = layers
        if not others:
            first, *rest = linear(x, single.weight, single.bias).split(3 * self.segment_dim, dim=3)
            return [F.hardswish(first), *rest]
        first = linear(x, single.weight, single.bias, "hardswish")
        return [first, *(linear(x, layer.weight, layer.bias) for layer in others)]

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, D)."""
        (B, H, W, _), D = x.shape, self.dim
        C, N = self.segment_dim, H * W
        if self.eps is not None:
            x = F.layer_norm(x, (D,), None, None, self.eps)
        if self.with_kernels and dispatch.kernels_available(x):
            return self._forward_kernels(x)
        single, *groups, last = self.segments(x)
        proxies = [single.reshape(B, N, 3, C)]
        for k, group, kernel, pointwise in zip(ops.GROUP_SIZES, groups, self.depthwise, self.pointwise, strict=True):
            grouped = F.conv2d(group.permute(0, 3, 1, 2), kernel, padding=k // 2, groups=3 * C)  # (B, 3C, H, W)
            grouped = grouped.permute(0, 2, 3, 1).reshape(B, N, 3, C)
            assert isinstance(pointwise, nn.Linear)
            proxies.append(linear(grouped, pointwise.weight, pointwise.bias, "hardswish"))
        qkv = [proxy.unbind(2) for proxy in proxies]  # 4 x 3 x (B, N, C)
        values = torch.cat([v for _, _, v in qkv], dim=2).view(B, H, W, 4 * C)
        position = self.position(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(B, N, 4 * C)
        mixed = []
        for (query, key, value), encoded in zip(qkv, position.split(C, dim=2), strict=True):
            mixed.append(ops.attend(query, key, value, encoded, self.scale, self.mask))  # (B, N, C)
        local = self.non_attention(last.permute(0, 3, 1, 2))  # (B, L, H, W)
        mixed.append(local.permute(0, 2, 3, 1).flatten(1, 2))
        return linear(torch.cat(mixed, dim=2), self.proj.weight, self.proj.bias).view(B, H, W, D)

    def _forward_kernels(self, x: Tensor) -> Tensor:
        """Do the same after the LayerNorm with the operations that have kernels."""
        (B, H, W, _), C = x.shape, self.segment_dim
        qkv = self.qkv[0](x).view(B, H, W, 5, 3, C)
        single, *_, last = qkv.unbind(3)  # (B, H, W, 3, C)
        grouped = ops.aggregate_groups(qkv.permute(3, 4, 0, 1, 2, 5)[1:4], self.kernel_weights)  # (3, 3, B, H, W, C)
        proxies = [F.hardswish(single.permute(3, 0, 1, 2, 4)).contiguous()]  # (3, B, H, W, C)
        for group, pointwise in zip(grouped, self.pointwise, strict=True):
            proxies.append(F.hardswish(pointwise(group), inplace=True))
        local = self.non_attention(last.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, C)
        assert self.position.bias is not None
        bias = self.position.bias.view(4, C)
        mixed: Tensor = self.proj(ops.attend_segments(proxies, local, self.position_weights, bias, self.scale))
        return mixed  # (B, H, W, D)


class FusedBlock(Fused):
    """Convolutional position encoding, attention and MLP with their residuals. (B, D, H, W) -> same."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.cpe = copy.deepcopy(block.cpe)
        self.cpe.weight[:, :, 1, 1] += 1  # the residual
        self.attn = FusedAttention(block.attn, block.norm1)
        self.eps = block.norm2.eps
        weight, bias = _after_norm(block.mlp.fc1.weight, block.mlp.fc1.bias, block.norm2)
        self.fc1 = _linear_layer(weight.to(block.mlp.fc1.weight), bias.to(block.mlp.fc1.weight))
        self.fc2 = _linear_layer(block.mlp.fc2.weight, block.mlp.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        x = self.cpe(x).permute(0, 2, 3, 1)  # (B, H, W, D)
        x = x + self.attn(x)
        hidden = F.layer_norm(x, (self.attn.dim,), None, None, self.eps)
        hidden = linear(hidden, self.fc1.weight, self.fc1.bias, "gelu")  # (B, H, W, hidden)
        x = x + linear(hidden, self.fc2.weight, self.fc2.bias)
        return x.permute(0, 3, 1, 2)


class FusedGroupMixAttention(Fused):
    """A `GroupMixAttention` that stands on its own. (B, D, H, W) -> (B, D, H, W)."""

    def __init__(self, attention: GroupMixAttention) -> None:
        super().__init__()
        self.attn = FusedAttention(attention)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return (B, D, H, W); with `size`, tokens (B, N, D) for tokens."""
        x = x if size is None else tokens_as_map(x, self.attn.dim, size)
        check_map(x, self.attn.dim)
        x = self.attn(x.permute(0, 2, 3, 1))  # (B, H, W, D)
        return x.permute(0, 3, 1, 2) if size is None else x.flatten(1, 2)


# A Block holds a GroupMixAttention, which is folded with what surrounds it.
_FUSED: dict[type[nn.Module], Any] = {
    Stem: FusedStem,
    SeparableConv: FusedSeparableConv,
    Block: FusedBlock,
    GroupMixAttention: FusedGroupMixAttention,
}


# What a module that is folded may consist of: an adapter or another norm in its place would be lost.
_OWN = {
    *_FUSED,
    *(network.NonAttention, network.GroupAggregators, network.ConvRelativePosition, network.Mlp),
    *(layers.BatchNorm2d, layers.LayerNorm2d, layers.Hardswish, layers.GELU, layers.Depthwise, layers.Blocks),
    *(nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, timm.layers.LayerNorm2d),
    *(nn.Hardswish, nn.GELU, nn.Identity, timm.layers.DropPath, nn.Sequential, nn.ModuleList),
}


def _check_own(name: str, module: nn.Module) -> None:
    for inner, part in module.named_modules(prefix=name):
        if type(part) not in _OWN:
            raise ValueError(
                f"got a {type(part).__name__} as {inner}, which cannot be folded, expected the network's own modules: merge it "
                "or take it out before fusing"
            )
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            raise ValueError(
                f"got a hook on {inner or type(module).__name__}, which folding would lose: remove it before fusing"
            )


def _fold_norms(mixer: Mixer) -> bool:
    """Fold each BN of another mixer into the convolution before it, and say whether there was one."""
    found = False
    for sequence in [module for module in mixer.modules() if isinstance(module, nn.Sequential)]:
        for (first, conv), (second, norm) in pairwise(list(sequence.named_children())):
            if type(conv) in (nn.Conv2d, layers.Depthwise) and type(norm) in (nn.BatchNorm2d, layers.BatchNorm2d):
                setattr(sequence, first, _conv_with_norm(conv, norm))
                setattr(sequence, second, nn.Identity())
                found = True
    return found


def _fold(name: str, module: nn.Module, done: dict[nn.Module, nn.Module], folded: Counter[str]) -> nn.Module:
    """Return the module or what takes its place, the same wherever it is used."""
    if module not in done:
        done[module] = module
        whole = isinstance(module, Block) and not isinstance(module.attn, Mixer) and not isinstance(module.mlp, AdaptFormer)
        if type(module) in _FUSED and (whole or not isinstance(module, Block)):
            _check_own(name, module)
            folded[type(module).__name__] += 1
            done[module] = _FUSED[type(module)](module)
        else:
            if isinstance(module, Mixer) and _fold_norms(module):
                folded[type(module).__name__] += 1
            for inner, child in module._modules.items():
                if child is not None:
                    module._modules[inner] = _fold(f"{name}.{inner}".lstrip("."), child, done, folded)
    return done[module]


@torch.no_grad()
def fuse(model: nn.Module) -> Any:
    """Return a new module for inference: the same function, faster.

    Convert the result, not the model, to another type: what is folded in float32 and rounded afterwards is nearer to the model.
    Compile or export the result, not the model. It can be exported and traced, but not scripted or traced by torch.fx.
    Fuse on the device where it will run: on a CPU, weights are laid out for oneDNN.

    Args:
        model: A `GroupMixFormer`, a `GroupMixAttention`, features of timm, or any network that holds one of them, such as a
            detector; in eval mode. It is left as it is.

    Returns:
        A copy whose parameters need no gradients. Its `folded` says how many modules of each kind were rewritten.

    Raises:
        ValueError: If the model is in training mode, compiled, or holds nothing to fuse, or if what would be folded has hooks
            or modules that are not the network's own, such as adapters.
    """
    if any(isinstance(module, torch._dynamo.OptimizedModule) for module in model.modules()):
        raise ValueError("got a compiled model: fuse the model that was compiled, and compile the result")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode, where nothing can be folded: call model.eval() first")
    folded: Counter[str] = Counter()
    fused = copy.deepcopy(model)
    merge_lora(fused)
    fused = _fold("", fused, {}, folded)
    if not folded:
        raise ValueError(f"{type(model).__name__} holds no GroupMixFormer or GroupMixAttention, or one that is fused already")
    fused.folded = dict(folded)  # type: ignore[assignment]
    return fused.requires_grad_(False).eval()
