"""Three operations of Group-Mix Attention as fused GPU kernels, each with a plain PyTorch twin of the same signature.

On a GPU the attention is bound by memory traffic and launches, so each operation makes one pass of what the network otherwise
does in many:

- `aggregate_groups`: the three depthwise convolutions of the group aggregators (Sec. 3), read where the linear layer left Q, K
  and V, written where the pointwise convolutions read them.
- `context`: softmax(K)^T V with a running maximum, so that K and V are read once.
- `combine`: Q @ context + Q * position for the four attention segments, written side by side as the projection reads them.

Each is a custom operator (`torch.library`), so autograd, torch.compile and torch.export know it. Its kernels are written in
Triton. They serve NVIDIA GPUs from Ampere on in float32, float16 and bfloat16 and accumulate in float32; other devices, float64
and machines without Triton take plain PyTorch. With TRITON_INTERPRET=1 in the environment Triton's interpreter runs the kernels
on the CPU.

Letters: B batch, H x W feature map, N = H * W tokens, C width of a segment, E = C / 2 width of a head, S segments, J = 3 for Q,
K and V (1 where one of them is meant), T taps: the entries of all depthwise kernels of the S segments. The first segment of an
operation has k = 3, the next k = 5, others k = 7. Maps are (S, J, B, H, W, C) with any strides that are multiples of C.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# Triton reads the annotations of a kernel itself, so arguments that are no compile-time constants have none.

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows
    triton, tl = None, SimpleNamespace(constexpr=None)

__all__ = ["aggregate_groups", "combine", "context", "plain_aggregate_groups", "plain_combine", "plain_context", "served"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether the network takes the kernels by itself. They have been tested in the interpreter and built for GPUs, not measured on
# one: until benchmarks/kernels.py has, GROUPMIXFORMER_KERNELS=1 asks for them.
WANTED = INTERPRETED or os.environ.get("GROUPMIXFORMER_KERNELS") == "1"
SIZES = (3, 5, 7, 7)  # k of the depthwise kernel, by segment


def served(x: Any) -> bool:
    """Tell whether Triton kernels serve `x`: a tensor on the right device and of the right type, and no proxy of torch.fx."""
    if triton is None or not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if x.is_cuda:
        return torch.version.cuda is not None and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return INTERPRETED and x.device.type == "cpu"


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


# Triton. Strides arrive in units of C, so that the compiler sees how addresses are aligned. Offsets inside a picture fit 32
# bits, offsets of a picture may not.


@_jit
def _picture(index, B, stride_j, stride_b, C: tl.constexpr):
    """Offset of the picture `index` of J * B."""
    return ((index // B).to(tl.int64) * stride_j + (index % B).to(tl.int64) * stride_b) * C


@_jit
def _pixels(tile, W, PIXELS: tl.constexpr):
    """Rows and columns of a tile, which is 8 pixels wide."""
    i = tl.arange(0, PIXELS)
    across = tl.cdiv(W, 8)
    return tile // across * (PIXELS // 8) + i // 8, tile % across * 8 + i % 8


@_jit
def _load(source, y, x, c, end, H, W, stride_y, stride_x, C: tl.constexpr):
    """Pixels of a map with zeros around it, in float32. (PIXELS, BLOCK)."""
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    offset = (y * stride_y + x * stride_x) * C
    return tl.load(source + offset[:, None] + c[None, :], inside[:, None] & (c < end)[None, :], 0.0).to(tl.float32)


@_jit
def _store(result, value, y, x, c, end, H, W, stride_y, stride_x, C: tl.constexpr):
    inside = (y < H) & (x < W)
    offset = (y * stride_y + x * stride_x) * C
    tl.store(result + offset[:, None] + c[None, :], value.to(result.dtype.element_ty), inside[:, None] & (c < end)[None, :])


@_jit
def _convolve(
    source, taps, y, x, c, end, H, W, stride_y, stride_x, C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Neighbours of pixels, weighted by `taps` (K * K, C). (PIXELS, BLOCK)."""
    total = tl.zeros((PIXELS, BLOCK), tl.float32)
    centres = source + ((y * stride_y + x * stride_x) * C)[:, None] + c[None, :]
    taps += c
    for i in range(K):
        row = y + (i - K // 2)
        row_inside = (row >= 0) & (row < H)
        for j in tl.static_range(K):
            column = x + (j - K // 2)
            inside = (row_inside & (column >= 0) & (column < W))[:, None] & (c < end)[None, :]
            near = tl.load(centres + ((i - K // 2) * stride_y + (j - K // 2) * stride_x) * C, inside, 0.0).to(tl.float32)
            tap = (K * K - 1 - i * K - j) if FLIP else (i * K + j)
            total += near * tl.load(taps + tap * C, c < end, 0.0).to(tl.float32)[None, :]
    return total


@_jit
def _convolve_segment(
    segment, source, taps, y, x, c, end, H, W, stride_y, stride_x, C: tl.constexpr, FLIP: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution with the segment's own kernel size, from the taps of all segments (T, C)."""
    if segment == 0:
        total = _convolve(source, taps, y, x, c, end, H, W, stride_y, stride_x, C, 3, FLIP, PIXELS, BLOCK)
    elif segment == 1:
        total = _convolve(source, taps + 9 * C, y, x, c, end, H, W, stride_y, stride_x, C, 5, FLIP, PIXELS, BLOCK)
    else:
        taps += (34 + 49 * (segment - 2)) * C
        total = _convolve(source, taps, y, x, c, end, H, W, stride_y, stride_x, C, 7, FLIP, PIXELS, BLOCK)
    return total


@_jit
def _depthwise_kernel(
    source, taps, result, B, H, W, s_s, s_j, s_b, s_y, s_x, r_s, r_j, r_b, r_y, r_x,
    C: tl.constexpr, FLIP: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one picture, segment and block of channels."""
    segment = tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    tiles = tl.cdiv(H, PIXELS // 8) * tl.cdiv(W, 8)
    picture = tl.program_id(0) // tiles
    y, x = _pixels(tl.program_id(0) % tiles, W, PIXELS)
    source += segment.to(tl.int64) * s_s * C + _picture(picture, B, s_j, s_b, C)
    result += segment.to(tl.int64) * r_s * C + _picture(picture, B, r_j, r_b, C)
    total = _convolve_segment(segment, source, taps, y, x, c, C, H, W, s_y, s_x, C, FLIP, PIXELS, BLOCK)
    _store(result, total, y, x, c, C, H, W, r_y, r_x, C)


@_jit
def _taps_gradient_kernel(
    grad, source, partial, pictures, B, H, W, T, g_s, g_j, g_b, g_y, g_x, s_s, s_j, s_b, s_y, s_x,
    C: tl.constexpr, TILES: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of gradient times neighbour over a run of tiles, for each tap. One run, segment and block of channels."""
    run, segment = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    size = tl.minimum(3 + 2 * segment, 7)
    first = tl.where(segment < 2, 9 * segment, 34 + 49 * (segment - 2))
    tiles = tl.cdiv(H, PIXELS // 8) * tl.cdiv(W, 8)
    grad += segment.to(tl.int64) * g_s * C
    source += segment.to(tl.int64) * s_s * C
    for tap in range(size * size):  # the run stays in the cache meanwhile
        total = tl.zeros((PIXELS, BLOCK), tl.float32)
        for tile in range(run * TILES, tl.minimum(run * TILES + TILES, tiles * pictures)):
            picture = tile // tiles
            y, x = _pixels(tile % tiles, W, PIXELS)
            here = _load(grad + _picture(picture, B, g_j, g_b, C), y, x, c, C, H, W, g_y, g_x, C)
            y, x = y + tap // size - size // 2, x + tap % size - size // 2
            total += here * _load(source + _picture(picture, B, s_j, s_b, C), y, x, c, C, H, W, s_y, s_x, C)
        tl.store(partial + (run.to(tl.int64) * T + first + tap) * C + c, tl.sum(total, 0), c < C)


@_jit
def _head(C: tl.constexpr, BLOCK: tl.constexpr):
    """Picture and segment, number of the head, its channels within itself and within the segment, and the end of those."""
    head = tl.program_id(2)
    e = tl.arange(0, BLOCK)
    return tl.program_id(0), head, e, head * (C // 2) + e, (head + 1) * (C // 2)


@_jit
def _tokens(source, n, c, end, N, stride_n, C: tl.constexpr):
    """Rows of a token matrix, zero beyond the last, in float32. (TOKENS, BLOCK)."""
    return tl.load(source + (n * stride_n * C)[:, None] + c[None, :], (n < N)[:, None] & (c < end)[None, :], 0.0).to(tl.float32)


@_jit
def _matrix(index, e, E: tl.constexpr):
    """Offsets of a matrix (E, E) of a head, and which of them are inside it. (BLOCK, BLOCK)."""
    return index.to(tl.int64) * E * E + e[:, None] * E + e[None, :], (e < E)[:, None] & (e < E)[None, :]


@_jit
def _product_kernel(
    left, right, product, maxima, sums, B, N, l_s, l_b, l_n, r_s, r_b, r_n,
    C: tl.constexpr, SOFTMAX: tl.constexpr, RUN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """left^T @ right over a run of tokens, or exp(left - its maximum)^T @ right. One picture and segment, run and head."""
    E: tl.constexpr = C // 2
    g, head, e, c, end = _head(C, BLOCK)
    run = tl.program_id(1)
    left += _picture(g, B, l_s, l_b, C)
    right += _picture(g, B, r_s, r_b, C)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    for start in range(run * RUN, tl.minimum(run * RUN + RUN, N), TOKENS):
        n = start + tl.arange(0, TOKENS)
        a, b = _tokens(left, n, c, end, N, l_n, C), _tokens(right, n, c, end, N, r_n, C)
        if SOFTMAX:
            a = tl.where((n < N)[:, None], a, float("-inf"))
            higher = tl.maximum(maximum, tl.max(a, 0))
            a, shrink = tl.exp(a - higher[None, :]), tl.exp(maximum - higher)
            total *= shrink[:, None]
            norm = norm * shrink + tl.sum(a, 0)
            maximum = higher
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    index = (run * tl.num_programs(0) + g) * 2 + head
    offset, inside = _matrix(index, e, E)
    tl.store(product + offset, total, inside)
    if SOFTMAX:
        tl.store(maxima + index * E + e, maximum, e < E)
        tl.store(sums + index * E + e, norm, e < E)


@_jit
def _merge_kernel(product, maxima, sums, result, maximum, norm, runs, C: tl.constexpr, BLOCK: tl.constexpr):
    """Join the runs of `_product_kernel` and normalise. One picture and segment, and head."""
    E: tl.constexpr = C // 2
    g, head, e, _, _ = _head(C, BLOCK)
    first, step = g * 2 + head, tl.num_programs(0) * 2
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for run in range(runs):
        highest = tl.maximum(highest, tl.load(maxima + (run * step + first) * E + e, e < E, 0.0))
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for run in range(runs):
        shrink = tl.exp(tl.load(maxima + (run * step + first) * E + e, e < E, 0.0) - highest)
        count += shrink * tl.load(sums + (run * step + first) * E + e, e < E, 1.0)
        offset, inside = _matrix(run * step + first, e, E)
        total += shrink[:, None] * tl.load(product + offset, inside, 0.0)
    offset, inside = _matrix(first, e, E)
    tl.store(result + offset, total / count[:, None], inside)
    tl.store(maximum + first * E + e, highest, e < E)
    tl.store(norm + first * E + e, count, e < E)


@_jit
def _context_backward_kernel(
    grad, result, maximum, norm, k, v, dk, dv, B, N, k_s, k_b, k_n, v_s, v_b, v_n,
    C: tl.constexpr, RUN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P = softmax(K), dV = P @ grad, dK = P * (V @ grad^T - sum of grad * result). One picture and segment, run and head."""
    E: tl.constexpr = C // 2
    g, head, e, c, end = _head(C, BLOCK)
    run = tl.program_id(1)
    offset, inside = _matrix(g * 2 + head, e, E)
    matrix = tl.load(grad + offset, inside, 0.0)
    shift = tl.sum(matrix * tl.load(result + offset, inside, 0.0), 1)
    highest = tl.load(maximum + (g * 2 + head) * E + e, e < E, 0.0)
    count = tl.load(norm + (g * 2 + head) * E + e, e < E, 1.0)
    k += _picture(g, B, k_s, k_b, C)
    v += _picture(g, B, v_s, v_b, C)
    dk += g.to(tl.int64) * N * C
    dv += g.to(tl.int64) * N * C
    for start in range(run * RUN, tl.minimum(run * RUN + RUN, N), TOKENS):
        n = start + tl.arange(0, TOKENS)
        # A row beyond the last token may be infinite; it meets no other row and is not stored.
        weight = tl.exp(_tokens(k, n, c, end, N, k_n, C) - highest[None, :]) / count[None, :]
        to_v = tl.dot(weight, matrix, input_precision=PRECISION)
        to_k = tl.dot(_tokens(v, n, c, end, N, v_n, C), tl.trans(matrix), input_precision=PRECISION)
        place, held = (n * C)[:, None] + c[None, :], (n < N)[:, None] & (c < end)[None, :]
        tl.store(dv + place, to_v.to(dv.dtype.element_ty), held)
        tl.store(dk + place, (weight * (to_k - shift[None, :])).to(dk.dtype.element_ty), held)


@_jit
def _combine_kernel(
    q, v, matrix, taps, bias, result, scale, B, H, W, q_s, q_b, q_y, q_x, v_s, v_b, v_y, v_x, r_s, r_b, r_y, r_x,
    C: tl.constexpr, TILES: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention: scale * Q @ matrix + Q * (convolution of V + bias). One picture and segment, run of tiles and head."""
    g, head, e, c, end = _head(C, BLOCK)
    run = tl.program_id(1)
    offset, inside = _matrix(g * 2 + head, e, C // 2)
    mixing = tl.load(matrix + offset, inside, 0.0)
    shift = tl.load(bias + g // B * C + c, c < end, 0.0).to(tl.float32)
    q += _picture(g, B, q_s, q_b, C)
    v += _picture(g, B, v_s, v_b, C)
    result += _picture(g, B, r_s, r_b, C)
    tiles = tl.cdiv(H, PIXELS // 8) * tl.cdiv(W, 8)
    for tile in range(run * TILES, tl.minimum(run * TILES + TILES, tiles)):
        y, x = _pixels(tile, W, PIXELS)
        query = _load(q, y, x, c, end, H, W, q_y, q_x, C)
        position = _convolve_segment(g // B, v, taps, y, x, c, end, H, W, v_y, v_x, C, False, PIXELS, BLOCK)
        attended = tl.dot(query, mixing, input_precision=PRECISION)
        _store(result, scale * attended + query * (position + shift[None, :]), y, x, c, end, H, W, r_y, r_x, C)


# Plain PyTorch, differentiable.


def _accumulated(x: Tensor) -> Tensor:
    """Return `x` in the type of sums over many tokens."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _depthwise(maps: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Convolve each segment of (S, J, B, H, W, C) with its kernel (C, 1, k, k), without bias."""
    results = []
    for x, weight in zip(maps.flatten(1, 2).permute(0, 1, 4, 2, 3), weights, strict=True):  # (JB, C, H, W)
        results.append(F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2, groups=len(weight)))
    return torch.stack(results).permute(0, 1, 3, 4, 2).unflatten(1, maps.shape[1:3]).contiguous()  # (S, J, B, H, W, C)


def plain_aggregate_groups(segments: Tensor, weight3: Tensor, weight5: Tensor, weight7: Tensor) -> Tensor:
    """Do what `aggregate_groups` does."""
    return _depthwise(segments.permute(4, 3, 0, 1, 2, 5), (weight3, weight5, weight7))  # (3, J, B, H, W, C)


def plain_context(k: Tensor, v: Tensor) -> Tensor:
    """Do what `context` does: one matrix product serves both heads, of which the blocks on the diagonal are kept."""
    product = k.softmax(2).transpose(2, 3) @ v  # (S, B, C, C)
    blocks = product.unflatten(3, (2, -1)).unflatten(2, (2, -1))  # (S, B, 2, E, 2, E)
    return _accumulated(blocks.diagonal(dim1=2, dim2=4).movedim(4, 2).contiguous())  # (S, B, 2, E, E)


def plain_combine(
    q: Tensor, v: Tensor, context: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], scale: float
) -> Tensor:
    """Do what `combine` does."""
    shift = torch.stack(list(biases)).to(q.dtype)[:, None, None, None]  # (S, 1, 1, 1, C)
    position = _depthwise(v[:, None], weights)[:, 0] + shift  # (S, B, H, W, C)
    blocks = torch.diag_embed((scale * context).to(q.dtype).movedim(2, 4))  # (S, B, E, E, 2, 2)
    attended = q.flatten(2, 3) @ blocks.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)  # (S, B, N, C)
    mixed = torch.addcmul(attended.view_as(position), q, position)
    return mixed.permute(1, 2, 3, 0, 4).flatten(3)  # (B, H, W, SC)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(3, (2, -1)).transpose(2, 3)  # (S, B, 2, N, E)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(2, 3).flatten(3)  # (S, B, N, C)


# Each step runs as a kernel where `served`, otherwise in plain PyTorch. Sizes of blocks are rules of thumb, chosen so
# that a block stays within registers and shared memory.


def _segments(x: Tensor) -> Tensor:
    """Return `x`, copied only if its strides are no multiples of C."""
    C = x.shape[-1]
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return x if x.stride(-1) == 1 and all(size == 1 or stride % C == 0 for size, stride in outer) else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    return tuple(stride // x.shape[-1] for stride in x.stride()[:-1])


def _block(x: Tensor) -> dict[str, int]:
    """Constants of a kernel that multiplies a head's matrices, padded to what tensor cores take."""
    block = max(16, triton.next_power_of_2(x.shape[-1] // 2))
    return {"C": x.shape[-1], "BLOCK": block, "num_warps": 8 if block > 32 else 4}


def _precision(x: Tensor) -> str:
    # TF32 holds every float16 and bfloat16 exactly and, unlike float16, the small weights of a softmax over many tokens.
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _weights(taps: Tensor, C: int) -> list[Tensor]:
    """Cut taps (T, C) into depthwise kernels (C, 1, k, k)."""
    sizes = SIZES if len(taps) > 83 else SIZES[:3]
    parts = taps.split([k * k for k in sizes])
    return [part.t().reshape(C, 1, k, k) for part, k in zip(parts, sizes, strict=True)]


def _taps(weights: Sequence[Tensor]) -> Tensor:
    """Join depthwise kernels (C, 1, k, k) into taps (T, C), which kernels read a row at a time."""
    return torch.cat([weight.flatten(1).t() for weight in weights])


def _convolve_maps(maps: Tensor, taps: Tensor, result: Tensor, flip: bool = False) -> Tensor:
    """Convolve into `result`; with flipped kernels this is the gradient of a convolution's input."""
    S, J, B, H, W, C = maps.shape
    if not served(maps):
        return result.copy_(_depthwise(maps, [w.flip(2, 3) if flip else w for w in _weights(taps, C)]))
    maps, taps = _segments(maps), taps.contiguous()
    grid = (J * B * triton.cdiv(H, 16) * triton.cdiv(W, 8), S, triton.cdiv(C, 16))
    sizes = (B, H, W, *_strides(maps), *_strides(result))
    _depthwise_kernel[grid](maps, taps, result, *sizes, C=C, FLIP=flip, PIXELS=128, BLOCK=16)
    return result


def _taps_gradient(grad: Tensor, maps: Tensor, taps: Tensor) -> Tensor:
    """Return the gradient of the taps (T, C) with which `maps` were convolved."""
    S, J, B, H, W, C = maps.shape
    if not served(maps):
        grads = []
        for g, x, weight in zip(grad, maps, _weights(taps, C), strict=True):
            g, x = (t.flatten(0, 1).permute(0, 3, 1, 2) for t in (g, x))  # (JB, C, H, W)
            padding = weight.shape[-1] // 2
            grads.append(conv2d_weight(x, weight.shape, g, padding=padding, groups=C))
        return _taps(grads).to(taps.dtype)
    grad, maps = _segments(grad), _segments(maps)
    runs = triton.cdiv(J * B * triton.cdiv(H, 16) * triton.cdiv(W, 8), 8)
    partial = maps.new_empty(runs, *taps.shape, dtype=torch.float32)
    sizes = (J * B, B, H, W, len(taps), *_strides(grad), *_strides(maps))
    grid = (runs, S, triton.cdiv(C, 16))
    _taps_gradient_kernel[grid](grad, maps, partial, *sizes, C=C, TILES=8, PIXELS=128, BLOCK=16)
    return partial.sum(0).to(taps.dtype)


def _products(left: Tensor, right: Tensor, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return left^T @ right of each head over runs of tokens (runs, S, B, 2, E, E), and maxima and sums (runs, S, B, C)."""
    left, right = _segments(left), _segments(right)
    S, B, N, C = left.shape
    runs = triton.cdiv(N, 2048)
    product = left.new_empty(runs, S, B, 2, C // 2, C // 2, dtype=torch.float32)
    maxima, sums = product.new_empty(2, runs, S, B, C).unbind(0)
    sizes = (B, N, *_strides(left), *_strides(right))
    constants = {"SOFTMAX": softmax, "RUN": 2048, "TOKENS": 64, "PRECISION": _precision(left), **_block(left)}
    _product_kernel[S * B, runs, 2](left, right, product, maxima, sums, *sizes, **constants)
    return product, maxima, sums


def _combine_maps(q: Tensor, v: Tensor, matrix: Tensor, taps: Tensor, bias: Tensor, scale: float, result: Tensor) -> Tensor:
    """Write scale * Q @ matrix + Q * (convolution of V + bias) into `result`. Maps are (S, B, H, W, C)."""
    S, B, H, W, C = q.shape
    if not served(q):
        mixed = plain_combine(q, v, matrix, _weights(taps, C), list(bias), scale)
        return result.copy_(mixed.unflatten(3, (S, C)).permute(3, 0, 1, 2, 4))
    q, v = _segments(q), _segments(v)
    constants = _block(q)
    pixels = 64 if constants["BLOCK"] > 32 else 128
    grid = (S * B, triton.cdiv(triton.cdiv(H, pixels // 8) * triton.cdiv(W, 8), 4), 2)
    sizes = (B, H, W, *_strides(q), *_strides(v), *_strides(result))
    tensors = (q, v, matrix.contiguous(), taps.contiguous(), bias.contiguous(), result)
    _combine_kernel[grid](*tensors, scale, *sizes, TILES=4, PIXELS=pixels, PRECISION=_precision(q), **constants)
    return result


# The operators. A backward pass is an operator too: compilers look at no kernel.


@torch.library.custom_op("groupmixformer::aggregate_groups", mutates_args=())
def _aggregate_groups(maps: Tensor, taps: Tensor) -> Tensor:
    return _convolve_maps(maps, taps, torch.empty_like(maps, memory_format=torch.contiguous_format))


@_aggregate_groups.register_fake
def _(maps: Tensor, taps: Tensor) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.contiguous_format)


def _empty_as_tokens(maps: Tensor) -> Tensor:
    """Return an empty (S, J, B, H, W, C) that lies in memory as the linear layer writes it."""
    S, J, B, H, W, C = maps.shape
    return maps.new_empty(B, H, W, J, S, C).permute(4, 3, 0, 1, 2, 5)


@torch.library.custom_op("groupmixformer::aggregate_groups_backward", mutates_args=())
def _aggregate_groups_backward(grad: Tensor, maps: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    return _convolve_maps(grad, taps, _empty_as_tokens(maps), flip=True), _taps_gradient(grad, maps, taps)


@_aggregate_groups_backward.register_fake
def _(grad: Tensor, maps: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_as_tokens(maps), torch.empty_like(taps)


@torch.library.custom_op("groupmixformer::context", mutates_args=())
def _context(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    S, B = k.shape[:2]
    if not served(k):
        maximum = _accumulated(k.amax(2))
        return plain_context(k, v), maximum, (_accumulated(k) - maximum[:, :, None]).exp().sum(2)
    product, maxima, sums = _products(k, v, softmax=True)
    result, maximum, norm = torch.empty_like(product[0]), torch.empty_like(maxima[0]), torch.empty_like(sums[0])
    _merge_kernel[S * B, 1, 2](product, maxima, sums, result, maximum, norm, len(product), **_block(k))
    return result, maximum, norm


@_context.register_fake
def _(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    S, B, _, C = k.shape
    result = _accumulated(k.new_empty(S, B, 2, C // 2, C // 2))
    return result, result.new_empty(S, B, C), result.new_empty(S, B, C)


@torch.library.custom_op("groupmixformer::context_backward", mutates_args=())
def _context_backward(
    grad: Tensor, result: Tensor, maximum: Tensor, norm: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    S, B, N, _ = k.shape
    if not served(k):
        weight = _heads((_accumulated(k) - maximum[:, :, None]).exp() / norm[:, :, None])  # (S, B, 2, N, E)
        to_k = weight * (_heads(_accumulated(v)) @ grad.transpose(3, 4) - (grad * result).sum(4)[:, :, :, None])
        return _joined(to_k).to(k.dtype), _joined(weight @ grad).to(v.dtype)
    k, v = _segments(k), _segments(v)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    sizes = (B, N, *_strides(k), *_strides(v))
    constants = {"RUN": 512, "TOKENS": 64, "PRECISION": _precision(k), **_block(k)}
    tensors = (grad.contiguous(), result, maximum, norm, k, v, dk, dv)
    _context_backward_kernel[S * B, triton.cdiv(N, 512), 2](*tensors, *sizes, **constants)
    return dk, dv


@_context_backward.register_fake
def _(grad: Tensor, result: Tensor, maximum: Tensor, norm: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("groupmixformer::combine", mutates_args=())
def _combine(q: Tensor, v: Tensor, context: Tensor, taps: Tensor, bias: Tensor, scale: float) -> Tensor:
    S, B, H, W, C = q.shape
    result = q.new_empty(B, H, W, S, C)
    _combine_maps(q, v, context, taps, bias, scale, result.permute(3, 0, 1, 2, 4))
    return result


@_combine.register_fake
def _(q: Tensor, v: Tensor, context: Tensor, taps: Tensor, bias: Tensor, scale: float) -> Tensor:
    S, B, H, W, C = q.shape
    return q.new_empty(B, H, W, S, C)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("groupmixformer::combine_backward", mutates_args=())
def _combine_backward(
    grad: Tensor, q: Tensor, v: Tensor, context: Tensor, taps: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = grad.permute(3, 0, 1, 2, 4)  # (S, B, H, W, C)
    dq, dv = q.new_empty(q.shape), v.new_empty(v.shape)
    _combine_maps(grad, v, context.transpose(3, 4), taps, bias, scale, dq)  # the gradient of Q is the same function of `grad`
    if served(q):
        product = _products(q.flatten(2, 3), grad.flatten(2, 3), softmax=False)[0].sum(0)  # (S, B, 2, E, E)
    else:
        product = _heads(_accumulated(q.flatten(2, 3))).transpose(3, 4) @ _heads(_accumulated(grad.flatten(2, 3)))
    to_position = (grad * q)[:, None]  # (S, 1, B, H, W, C)
    _convolve_maps(to_position, taps, dv[:, None], flip=True)
    dbias = to_position.sum((1, 2, 3, 4), dtype=product.dtype).to(bias.dtype)  # (S, C)
    return dq, dv, scale * product, _taps_gradient(to_position, v[:, None], taps), dbias


@_combine_backward.register_fake
def _(grad: Tensor, q: Tensor, v: Tensor, context: Tensor, taps: Tensor, bias: Tensor, scale: float) -> Gradients:
    return q.new_empty(q.shape), v.new_empty(v.shape), torch.empty_like(context), torch.empty_like(taps), torch.empty_like(bias)


def _keep_for_groups(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _keep_for_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs)
    ctx.mark_non_differentiable(*output[1:])


def _keep_for_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[5]


_aggregate_groups.register_autograd(
    lambda ctx, grad: _aggregate_groups_backward(grad, *ctx.saved_tensors), setup_context=_keep_for_groups
)
_context.register_autograd(lambda ctx, grad, *_: _context_backward(grad, *ctx.saved_tensors), setup_context=_keep_for_context)
_combine.register_autograd(
    lambda ctx, grad: (*_combine_backward(grad, *ctx.saved_tensors, ctx.scale), None), setup_context=_keep_for_combine
)


def aggregate_groups(segments: Tensor, weight3: Tensor, weight5: Tensor, weight7: Tensor) -> Tensor:
    """Aggregate Q, K and V over 3 x 3, 5 x 5 and 7 x 7 neighbours: the depthwise convolutions of three segments (Sec. 3).

    Args:
        segments: Segments 1 to 3 of Q, K and V as the linear layer wrote them (B, H, W, J, 3, C).
        weight3: Depthwise kernel of the first (C, 1, 3, 3), the same for Q, K and V.
        weight5: Of the second (C, 1, 5, 5).
        weight7: Of the third (C, 1, 7, 7).

    Returns:
        (3, J, B, H, W, C), contiguous: by group size, with Q, K and V stacked along the batch.
    """
    return _aggregate_groups(segments.permute(4, 3, 0, 1, 2, 5), _taps((weight3, weight5, weight7)))


def context(k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(K)^T V of the two heads of each segment; the softmax is taken over the tokens.

    Args:
        k: (S, B, N, C).
        v: (S, B, N, C).

    Returns:
        (S, B, 2, E, E), for each head. In float32 at least: it is small, and its gradient, a sum over all tokens, can exceed
        what float16 holds.
    """
    return _context(k, v)[0]


def combine(q: Tensor, v: Tensor, context: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], scale: float) -> Tensor:
    """Add attention and relative position encoding: scale * Q @ context + Q * (convolution of V + bias).

    Args:
        q: (S, B, H, W, C).
        v: (S, B, H, W, C).
        context: (S, B, 2, E, E).
        weights: A depthwise kernel (C, 1, k, k) for each segment, with k = 3, 5, 7, 7.
        biases: Their biases (C).
        scale: Factor of the attention, not of the position encoding.

    Returns:
        (B, H, W, SC), segments side by side.
    """
    return _combine(q, v, context, _taps(weights), torch.stack(list(biases)), scale).flatten(3)
