"""The leaves of the network: PyTorch's layers, with parameters of the same names, that take the fast paths of `ops`.

Each is an ordinary module: it can be replaced, hooked, adapted, scripted, traced and exported like the layer it extends.
"""

from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import dispatch, recompute
from ..ops.onednn import depthwise

__all__ = ["GELU", "BatchNorm2d", "Blocks", "Depthwise", "Hardswish", "LayerNorm2d", "check_images", "check_map"]


@torch.fx.wrap
def check_images(x: Tensor, in_chans: int) -> None:
    """Check images (B, in_chans, H, W).

    Raises:
        ValueError: If they do not have `in_chans` channels, a side is under 32, or they are not floating point.
    """
    if x.dim() != 4 or x.shape[1] != in_chans or x.shape[2] < 32 or x.shape[3] < 32:
        raise ValueError(
            f"got an input of shape {list(x.shape)}, expected (batch, {in_chans}, height, width) with height and width "
            "of at least 32: resize or pad the images, or create the model with another in_chans"
        )
    if not x.is_floating_point():
        raise ValueError(f"got an input of type {x.dtype}, expected floating point: convert the images and normalise them")


@torch.fx.wrap
def check_map(x: Tensor, dim: int) -> None:
    """Check a feature map (B, dim, H, W).

    Raises:
        ValueError: If it has another rank or width.
    """
    if x.dim() != 4 or x.shape[1] != dim:
        tokens = f"; tokens (batch, number, {dim}) need their map's (height, width) as second argument" if x.dim() == 3 else ""
        raise ValueError(f"got an input of shape {list(x.shape)}, expected a feature map (batch, {dim}, height, width){tokens}")


def tokens_as_map(x: Tensor, dim: int, size: tuple[int, int]) -> Tensor:
    """Read tokens in row-major order as a map, a view: (B, H * W, dim) -> (B, dim, H, W).

    Raises:
        ValueError: If they have another rank, number or width.
    """
    height, width = size
    if x.dim() != 3 or x.shape[1] != height * width or x.shape[2] != dim:
        raise ValueError(
            f"got an input of shape {list(x.shape)}, expected the tokens of a map of {height} x {width}, "
            f"(batch, {height * width}, {dim})"
        )
    return x.transpose(1, 2).unflatten(2, [height, width])


class Depthwise(nn.Conv2d):
    """A depthwise convolution k x k, k odd. (B, C, H, W) -> (B, C, ceil(H/s), ceil(W/s))."""

    def __init__(
        self, dim: int, kernel_size: int, stride: int = 1, bias: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, C, ceil(H/s), ceil(W/s))."""
        if torch.jit.is_scripting():
            x = self._conv_forward(input, self.weight, self.bias)
        elif self.stride == (1, 1) and isinstance(input, Tensor) and dispatch.is_eager():
            x = depthwise(input, self.weight, self.bias)
        else:  # in a graph, of torch.fx too, padding and groups have to be numbers
            x = self._conv_forward(input, self.weight, self.bias)
        return x


# Of norms and activations a training step keeps the input instead of the result, see `ops.recompute`.


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation. (B, D, H, W) -> same."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        if torch.jit.is_scripting():
            x = self._functional(input)
        elif isinstance(input, Tensor):
            x = super().forward(input)
            recompute.forget(x, self._same_again, input)
        else:  # a proxy of torch.fx
            x = self._functional(input)
        return x

    def _functional(self, x: Tensor) -> Tensor:
        momentum, training = 0.1 if self.momentum is None else self.momentum, self.training
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, momentum, self.eps)

    @torch.jit.unused
    def _same_again(self, x: Tensor) -> Tensor:
        """Do the same without a change of the running statistics."""
        if self.training or self.running_mean is None:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class LayerNorm2d(timm.layers.LayerNorm2d):
    """Normalisation over the channels. (B, D, H, W) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        y = self._same_again(x)
        if not torch.jit.is_scripting():
            recompute.forget(y, self._same_again, x)
        return y

    def _same_again(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, H, W, D)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Hardswish(nn.Hardswish):
    """x * relu6(x + 3) / 6."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        x = F.hardswish(input)
        if not torch.jit.is_scripting():
            recompute.forget(x, F.hardswish, input)
        return x


class GELU(nn.GELU):
    """The Gaussian error linear unit, exact by erf."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        x = F.gelu(input)
        if not torch.jit.is_scripting():
            recompute.forget(x, F.gelu, input)
        return x


class Blocks(nn.Sequential):
    """Blocks in turn. With `grad_checkpointing` each is run again in the backward pass instead of keeping its activations."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, input: Tensor) -> Tensor:
        """Return what the last block gives."""
        x = input
        if torch.jit.is_scripting():
            for block in self:
                x = block(x)
        else:
            with recompute.scope(x):
                for block in self:
                    x = recompute.checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x
