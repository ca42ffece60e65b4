"""What token mixers share: their interface, multi-head attention, and windows whose padding nobody sees.

Letters: B batch, H x W map, N = H * W tokens, D width, h heads, T tokens of a window, n windows of an image.
"""

from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OptTensor = Optional[Tensor]  # noqa: UP045 - TorchScript


class Mixer(nn.Module):
    """A token mixer. (B, D, H, W) -> (B, D, H, W) for any H and W of at least 1; no norm before it and no residual.

    Subclasses take ``(dim, *, stage, depth, **options)``, where `stage` is the index of the stage and `depth` that of the block
    in its stage. Options that several have: `head_dim`, the width of a head that is wanted, of which the nearest that divides
    `dim` is taken; `window`, the side of a window. Where a map is padded, padded tokens are no keys, and no statistics contain
    them.
    """

    if TYPE_CHECKING:  # TorchScript takes an annotation for an interface
        attn: Any  # what does the work; of the map where a subclass has no forward of its own

    def macs(self, height: int, width: int) -> float:
        """Return the multiply-accumulates of matrix products and convolutions for one map that needs no padding.

        Norms, activations, pooling and products of single elements are not counted.
        """
        return self._macs(height, width)

    def _macs(self, height: int, width: int) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H, W)."""
        return self.attn(x)


def by_stage(values: tuple[int, ...], stage: int, wanted: int | None = None) -> int:
    """Return what is wanted, or else the value of the stage, the last one for later stages."""
    return values[min(stage, len(values) - 1)] if wanted is None else wanted


def heads_of(dim: int, head_dim: float = 32, multiple: int = 1) -> int:
    """Return how many heads bring their width nearest to `head_dim`: a divisor of `dim` and multiple of `multiple`.

    Raises:
        ValueError: If there is none.
    """
    fitting = [heads for heads in range(multiple, dim + 1, multiple) if dim % heads == 0]
    if not fitting or head_dim <= 0:
        raise ValueError(
            f"got dim={dim} and head_dim={head_dim}, expected a positive multiple of {multiple} and a positive width"
        )
    return min(fitting, key=lambda heads: abs(heads - dim / head_dim))


def multi_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: OptTensor = None,
    scale: Optional[float] = None,  # noqa: UP045 - TorchScript
) -> Tensor:
    """Attend with heads side by side in the channels.

    Args:
        q: Queries (B, N, D).
        k: Keys (B, M, D).
        v: Values (B, M, V).
        heads: Number of heads.
        mask: True where a query may see a key, for (B, h, N, M); or what is added to their product.
        scale: Of their product; by default the width of a head ** -0.5.

    Returns:
        (B, N, V).
    """
    q = q.unflatten(2, [heads, q.shape[2] // heads]).transpose(1, 2)  # (B, h, N, D / h)
    k = k.unflatten(2, [heads, k.shape[2] // heads]).transpose(1, 2)
    v = v.unflatten(2, [heads, v.shape[2] // heads]).transpose(1, 2)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)  # (B, N, h, V / h)
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles what stands beside it in a condition
        if torch.compiler.is_exporting():
            x = x.clone(memory_format=torch.contiguous_format)  # ONNX's product lies otherwise in memory than the traced one
    return x.flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762) of tokens. (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int, **dd: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, mask: OptTensor = None) -> Tensor:
        """Return (B, N, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=2)
        return self.proj(multi_head(q, k, v, self.heads, mask))


def pad(x: Tensor, bottom: int, right: int) -> Tensor:
    """Pad (B, H, W, D). What stands there must not matter: tests put other values."""
    return F.pad(x, [0, 0, 0, right, 0, bottom])


def _cut(length: int, window: int) -> tuple[int, int]:
    """Return the number of windows along a side and their length; 0 asks for one over the whole."""
    if window == 0:
        return 1, length
    return (length + window - 1) // window, window


def _shifted(length: int, window: int, shift: int, like: Tensor) -> Tensor:
    """Return where each index of a padded side comes from, beyond its end or start too. A side within one window stays."""
    index = torch.arange(length, device=like.device)
    return index + shift * (index[-1:] >= window)  # by a tensor, so that an exported graph holds for any length


def _wrapped(source: Tensor, length: int) -> Tensor:
    source = torch.where(source < length, source, source - length)
    return torch.where(source < 0, source + length, source)


def _regions(length: int, size: int, window: int, shift: int, like: Tensor) -> Tensor:
    """Number what may attend to each other along one side: 0 padding, 1 the map, 2 what the shift brought from its start."""
    source = _shifted(length, window, shift, like)
    return torch.where(_wrapped(source, length) < size, 1 + (source >= length).int(), 0)


def partition(x: Tensor, h: int, w: int, shift: int = 0, columns: int = 0) -> tuple[Tensor, Tensor, OptTensor]:
    """Cut a map into windows, padded below and on the right, after a cyclic shift up and left.

    Args:
        x: Tokens (B, H, W, D).
        h: Rows of a window; 0 for all.
        w: Columns of a window; 0 for all.
        shift: Rows and columns of the shift; a side that is within one window is not shifted.
        columns: Of windows; 0 for as many as the map fills.

    Returns:
        Windows (B * n, T, D), image by image; which of their tokens are of the map (n, T); and which keys (last) a token may
        see (B * n, 1, T, T), or none where every token of a window may see every other. A padded token sees the other padded
        ones, so that no softmax is empty.
    """
    B, H, W, D = x.shape
    rows, h = _cut(H, h)
    if columns == 0:
        columns, w = _cut(W, w)
    x = pad(x, rows * h - H, columns * w - W)
    below, right = _regions(rows * h, H, h, shift, x)[:, None], _regions(columns * w, W, w, shift, x)
    if shift > 0:
        x = x.index_select(1, _wrapped(_shifted(rows * h, h, shift, x), rows * h))
        x = x.index_select(2, _wrapped(_shifted(columns * w, w, shift, x), columns * w))
    x = x.reshape(B, rows, h, columns, w, D).transpose(2, 3).reshape(B * rows * columns, h * w, D)
    region = (below + 2 * right) * (below > 0) * (right > 0)  # (H', W')
    region = region.view(rows, h, columns, w).transpose(1, 2).reshape(rows * columns, h * w)
    whole = shift == 0 and rows * h == H and columns * w == W
    if not torch.jit.is_scripting():
        whole = not torch.compiler.is_exporting() and whole  # an exported graph holds for any size
    if whole:
        return x, region > 0, None
    return x, region > 0, (region[:, :, None] == region[:, None, :])[:, None].repeat(B, 1, 1, 1)


def merge(x: Tensor, h: int, w: int, H: int, W: int, shift: int = 0, columns: int = 0) -> Tensor:
    """Undo `partition`: windows (B * n, T, D) -> the map (B, H, W, D)."""
    rows, h = _cut(H, h)
    if columns == 0:
        columns, w = _cut(W, w)
    B, D = x.shape[0] // (rows * columns), x.shape[2]
    x = x.reshape(B, rows, columns, h, w, D).transpose(2, 3).reshape(B, rows * h, columns * w, D)
    if shift > 0:
        x = x.index_select(1, _wrapped(_shifted(rows * h, h, -shift, x), rows * h))
        x = x.index_select(2, _wrapped(_shifted(columns * w, w, -shift, x), columns * w))
    return x[:, :H, :W]


def additive(bias: Tensor, seen: OptTensor) -> Tensor:
    """Add a mask (B * n, 1, T, T) to a bias of attention (1, h, T, T)."""
    if seen is None:
        return bias
    return torch.where(seen, bias, float("-inf"))


def cell_means(x: Tensor, size: int) -> Tensor:
    """Average a map's tokens within cells of s x s, without padding. (B, H, W, D) -> (B, ceil(H/s), ceil(W/s), D)."""
    B, H, W, D = x.shape
    cells, real, _ = partition(x, size, size)
    weight = real[:, :, None].to(x.dtype)  # (n, T, 1)
    cells = cells.view(B, -1, size * size, D) * weight
    return (cells.sum(2) / weight.sum(1)).view(B, (H + size - 1) // size, (W + size - 1) // size, D)


def _means(length: int, size: int, like: Tensor) -> Tensor:
    """Return what averages a side to `size` cells, (size, length)."""
    cell, place = torch.arange(size, device=like.device)[:, None], torch.arange(length, device=like.device)
    inside = ((place >= cell * length // size) & (place < ((cell + 1) * length + size - 1) // size)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def average_to(x: Tensor, size: int) -> Tensor:
    """Average a map to size x size cells, as `F.adaptive_avg_pool2d` does. (B, D, H, W) -> (B, D, size, size)."""
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles what stands beside it in a condition
        if torch.compiler.is_exporting():  # an exported graph holds for any size, which ONNX's pools do not
            return _means(x.shape[2], size, x) @ x @ _means(x.shape[3], size, x).T
    return F.adaptive_avg_pool2d(x, (size, size))
