"""Group-Mix Attention, or any mixer, in the place of the attention of Swin, PVTv2, ViT and DeiT of timm."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import timm
import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..groupmixformer import GroupMixFormer
from . import make_mixer


class _SwinBlock(SwinTransformerBlock):
    """A block whose attention takes the whole map."""

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def set_input_size(self, feat_size: tuple[int, int], window_size: Any = None, always_partition: bool | None = None) -> None:
        """Do nothing: no size is built in."""

    def _init_buffers(self) -> None:
        self.register_buffer("attn_mask", None, persistent=False)


class _OfTokens(nn.Module):
    """A mixer for tokens, of which the first may be class tokens. (B, P + N, D) -> same.

    Class tokens are in no map. They get what the tokens of the map get on average.
    """

    def __init__(self, mixer: nn.Module, prefix: int = 0, grid: "_Grid | None" = None) -> None:
        super().__init__()
        self.mixer, self.prefix, self.grid = mixer, prefix, grid

    def forward(self, x: Tensor, size: Any = None, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (B, P + N, D)."""
        if attn_mask is not None or is_causal:
            raise ValueError("got a mask of attention, expected none: a mixer takes whole maps")
        height, width = size if self.grid is None else self.grid.size
        tokens = x[:, self.prefix :]
        maps = tokens.transpose(1, 2).reshape(len(x), -1, height, width)
        tokens = self.mixer(maps).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(dim=1, keepdim=True).expand(-1, self.prefix, -1), tokens], dim=1)


class _Grid:
    """Sees, as a hook of the patch embedding, how many patches an image has. Copied together with the model."""

    size: tuple[int, int]

    def __call__(self, embed: Any, images: tuple[Tensor, ...], patches: Tensor) -> None:
        height, width = embed.grid_size if patches.dim() == 3 else patches.shape[1:3]
        self.size = height, width


def _blocks(model: nn.Module) -> Iterator[tuple[int, int, Any]]:
    """Give stage, depth and block."""
    if isinstance(model, VisionTransformer):
        yield from ((2, depth, block) for depth, block in enumerate(model.blocks))  # as its stride of 16
        return
    stages: Any = model.layers if isinstance(model, SwinTransformer) else model.stages
    for stage, part in enumerate(stages):
        yield from ((stage, depth, block) for depth, block in enumerate(part.blocks))


def _resize(mlp: Any, factor: float) -> None:
    """Scale the hidden width of an MLP; hidden units that stay keep their weights."""
    old = mlp.fc1.out_features
    hidden = max(1, round(old * factor))
    for name in ("fc1", "dwconv", "fc2"):
        if not hasattr(mlp, name):
            continue
        layer = getattr(mlp, name)
        like = {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
        if name == "dwconv":
            new: Any = nn.Conv2d(hidden, hidden, layer.kernel_size, layer.stride, layer.padding, groups=hidden, **like)
        else:
            new = nn.Linear(*((layer.in_features, hidden) if name == "fc1" else (hidden, layer.out_features)), **like)
        with torch.no_grad():
            for key, tensor in new.named_parameters():
                kept = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, getattr(layer, key).shape, strict=True))
                tensor[kept] = getattr(layer, key)[kept]
        setattr(mlp, name, new)


def _parameters(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(model: nn.Module, size: tuple[int, int]) -> float:
    model = copy.deepcopy(model).to("meta").eval()
    weight = next(model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *size, device="meta", dtype=weight.dtype))
    return counter.get_total_flops() / 2


def _match(model: Any, target: float, cost: Callable[[nn.Module], float]) -> None:
    """Scale the hidden widths of all MLPs so that `cost` becomes `target`."""

    def scaled(factor: float) -> Any:
        trial = copy.deepcopy(model)
        for _, _, block in _blocks(trial):
            _resize(block.mlp, factor)
        return trial

    full, half = cost(model), cost(scaled(0.5))  # linear in the width
    factor = 1 + (target - full) / (2 * (full - half))
    reached = cost(scaled(factor)) if factor > 0 else full
    if factor <= 0 or abs(reached / target - 1) > 0.02:
        raise ValueError(
            f"got a mixer that costs too much: {full:.4g} against {target:.4g}, which no width of the MLPs makes up for"
        )
    for _, _, block in _blocks(model):
        _resize(block.mlp, factor)


def replace_attention(
    model: nn.Module,
    mixer: str = "group_mix",
    options: Mapping[str, Any] | None = None,
    match: Literal["parameters", "macs"] | None = None,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Put a mixer in the place of every attention of a Swin, PVTv2, ViT or DeiT of timm; all other weights stay.

    The result takes images of any size that the model takes. Class tokens, which are in no map, get the mean of what the map
    gets.

    Args:
        model: Is left as it is.
        mixer: By its name in `MIXERS`.
        options: Of the mixer.
        match: Bring parameters or multiply-accumulates (macs) back to those of `model`, to 2 %, by the hidden width of the
            MLPs, whose remaining units keep their weights.
        image_size: Height and width for which multiply-accumulates are matched; by default the model's own.

    Raises:
        ValueError: If the model is another one, there is no such mixer or option, or nothing can match.
    """
    result: Any = copy.deepcopy(model)
    if not isinstance(model, SwinTransformer | PyramidVisionTransformerV2 | VisionTransformer):
        raise ValueError(f"got a {type(model).__name__}, expected a Swin, PVTv2, ViT or DeiT of timm")
    grid = None
    if isinstance(model, VisionTransformer):
        grid = _Grid()
        result.patch_embed.register_forward_hook(grid)
    for stage, depth, block in _blocks(result):
        weight, dim = block.norm1.weight, block.norm1.normalized_shape[0]
        made = make_mixer(mixer, dim, stage, depth, dict(options or {}), device=weight.device, dtype=weight.dtype)
        made.apply(GroupMixFormer._init_weights)
        if isinstance(block, SwinTransformerBlock):
            block.__class__, block.attn = _SwinBlock, made
            block._init_buffers()
        else:
            block.attn = _OfTokens(made, getattr(result, "num_prefix_tokens", 0), grid)
    if match is not None:
        if match not in ("parameters", "macs"):
            raise ValueError(f"got match={match!r}, expected parameters, macs or none")
        size = image_size or tuple(result.pretrained_cfg["input_size"][1:])
        cost = _parameters if match == "parameters" else functools.partial(_macs, size=size)
        _match(result, cost(model), cost)
    return result.train(model.training)


def is_put_in(name: str, options: Mapping[str, Any]) -> bool:
    """Whether `create_model` puts a mixer in the place of the attention of timm's model of this name."""
    return "mixer" in options and not name.startswith("groupmixformer")


def create_model(name: str, mixer: str | None = None, mixer_options: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Return ``timm.create_model(name, **options)`` with a mixer: a GroupMixFormer's own, or put there by `replace_attention`.

    Raises:
        TypeError: If the model has no such option.
        ValueError: If the mixer does not exist or fit.
    """
    if mixer is None or name.startswith("groupmixformer"):
        return timm.create_model(name, mixer=mixer, mixer_options=mixer_options, **options)  # timm leaves out what is None
    return replace_attention(timm.create_model(name, **options), mixer, mixer_options)
