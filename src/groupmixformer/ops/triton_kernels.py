"""The two passes of Group-Mix Attention over a map's tokens as Triton kernels, forward only; `attention` is their door.

- `aggregate_groups`: the three depthwise convolutions of the group aggregators (Sec. 3), read where the linear layer left Q, K
  and V, written where the pointwise convolutions read them.
- `attend_segments`: softmax(K)^T V with a running maximum, so that K and V are read once; then Q @ context + Q * position for
  the four attention segments, written beside the branch without attention as the projection reads them.

Everything is accumulated in float32. What they compute is defined in `reference`, which has their letters: B batch, H x W
feature map, N = H * W tokens, C width of a segment, E = C / 2 width of a head, J = 3 for Q, K and V, T entries of a channel's
depthwise kernels, of all segments together.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="untyped-decorator"
# Triton reads the annotations of a kernel itself, so arguments that are no compile-time constants have none.

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["aggregate_groups", "attend_segments"]

# Sizes of blocks were chosen on an H200, so that a block stays within registers and shared memory. So were these numbers of
# programs, 8 and 16 for each of its 132 multiprocessors: of longer runs of tokens there are too few to fill a GPU, of shorter
# ones too many that load the same matrices.
_CONTEXT_PROGRAMS = 8 * 132
_COMBINE_PROGRAMS = 16 * 132
_MAX_REGISTERS = 128  # a thread; with fewer, more blocks run at a time

# Strides arrive in units of C, so that the compiler sees how addresses are aligned. A convolution is worked out for strips of 4
# pixels in a row: of 10 neighbours that are loaded for 7 weights each is used up to 4 times. Strips are numbered through all
# images, so that small maps fill blocks too.


@triton.jit
def _select_pointer(segment, a, b, c, d):
    """One of four pointers."""
    if segment == 1:
        a = b
    elif segment == 2:
        a = c
    elif segment == 3:
        a = d
    return a


@triton.jit
def _strips(first, strips, H, across, STRIPS: tl.constexpr):
    """Which of the strips exist, and for each its image, row and first column."""
    strip = first + tl.arange(0, STRIPS)
    row = strip // across
    return strip < strips, row // H, row % H, strip % across * 4


@triton.jit
def _pixels(source, j, b, y, x, c, W, stride_j, stride_b, stride_n, C: tl.constexpr):
    """Addresses of pixels, each with its channels. (STRIPS, BLOCK)."""
    offset = (j.to(tl.int64) * stride_j + b.to(tl.int64) * stride_b + (y * W + x) * stride_n) * C
    return source + offset[:, None] + c[None, :]


@triton.jit
def _convolve(
    source, kernel_weights, mask, y, x, c, end, H, W, step, C: tl.constexpr, K: tl.constexpr, STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Neighbours of the pixels at the addresses `source`, weighted by `kernel_weights` (K * K, C). 4 x (STRIPS, BLOCK)."""
    zero = tl.zeros((STRIPS, BLOCK), tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    for i in range(K):
        row = y + (i - K // 2)
        row_mask = mask & (row >= 0) & (row < H)
        line = source + (i - K // 2) * W * step
        weights = kernel_weights + i * K * C + c
        for j in tl.static_range(K + 3):
            column = x + (j - K // 2)
            inside = (row_mask & (column >= 0) & (column < W))[:, None] & (c < end)[None, :]
            near = tl.load(line + (j - K // 2) * step, inside, 0.0).to(tl.float32)
            if j < K:
                s0 += near * tl.load(weights + j * C, c < end, 0.0).to(tl.float32)[None, :]
            if j >= 1 and j < K + 1:
                s1 += near * tl.load(weights + (j - 1) * C, c < end, 0.0).to(tl.float32)[None, :]
            if j >= 2 and j < K + 2:
                s2 += near * tl.load(weights + (j - 2) * C, c < end, 0.0).to(tl.float32)[None, :]
            if j >= 3:
                s3 += near * tl.load(weights + (j - 3) * C, c < end, 0.0).to(tl.float32)[None, :]
    return s0, s1, s2, s3


@triton.jit
def _convolve_segment(
    segment, source, kernel_weights, mask, y, x, c, end, H, W, step, C: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Depthwise convolution with the segment's own kernel, of those of all segments (T, C): k = 3, 5, 7 and 7."""
    if segment == 0:
        s0, s1, s2, s3 = _convolve(source, kernel_weights, mask, y, x, c, end, H, W, step, C, 3, STRIPS, BLOCK)
    elif segment == 1:
        kernel_weights += 3 * 3 * C
        s0, s1, s2, s3 = _convolve(source, kernel_weights, mask, y, x, c, end, H, W, step, C, 5, STRIPS, BLOCK)
    else:
        kernel_weights += (3 * 3 + 5 * 5 + 7 * 7 * (segment - 2)) * C
        s0, s1, s2, s3 = _convolve(source, kernel_weights, mask, y, x, c, end, H, W, step, C, 7, STRIPS, BLOCK)
    return s0, s1, s2, s3


@triton.jit
def _store(result, value, mask, column, c, end, W):
    tl.store(result, value.to(result.dtype.element_ty), (mask & (column < W))[:, None] & (c < end)[None, :])


@triton.jit
def _aggregate_kernel(
    segments, kernel_weights, result, strips, B, H, W, across, stride_s, stride_j, stride_b, stride_n, result_s,
    C: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One run of strips, segment and block of channels. The result is contiguous."""
    segment = tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask, image, y, x = _strips(tl.program_id(0) * STRIPS, strips, H, across, STRIPS)
    segments += segment.to(tl.int64) * stride_s * C
    source = _pixels(segments, image // B, image % B, y, x, c, W, stride_j, stride_b, stride_n, C)
    result += segment.to(tl.int64) * result_s * C
    result = _pixels(result, image // B, image % B, y, x, c, W, B * H * W, H * W, 1, C)
    s0, s1, s2, s3 = _convolve_segment(segment, source, kernel_weights, mask, y, x, c, C, H, W, stride_n * C, C, STRIPS, BLOCK)
    _store(result, s0, mask, x, c, C, W)
    _store(result + C, s1, mask, x + 1, c, C, W)
    _store(result + 2 * C, s2, mask, x + 2, c, C, W)
    _store(result + 3 * C, s3, mask, x + 3, c, C, W)


# A segment has two heads. Their matrices (E, E) are the blocks on the diagonal of one (C, C), which tensor cores work out in
# one, unless it is too large for that. WIDTH is C or E.


@triton.jit
def _channels(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of the segment that a program takes, and their end."""
    first = tl.program_id(2) * WIDTH
    return first + tl.arange(0, BLOCK), first + WIDTH


@triton.jit
def _head_blocks(index, c, end, C: tl.constexpr):
    """Offsets of the diagonal blocks within matrices (2, E, E), and what is inside them. (BLOCK, BLOCK)."""
    E: tl.constexpr = C // 2
    inside = (c < end)[:, None] & (c < end)[None, :] & ((c // E)[:, None] == (c // E)[None, :])
    return index.to(tl.int64) * C * E + (c * E)[:, None] + (c % E)[None, :], inside


@triton.jit
def _tokens(source, n, c, end, N, stride_n, C: tl.constexpr):
    """Rows of a token matrix, zero beyond the last, in float32. (TOKENS, BLOCK)."""
    return tl.load(source + (n * stride_n * C)[:, None] + c[None, :], (n < N)[:, None] & (c < end)[None, :], 0.0).to(tl.float32)


@triton.jit
def _context_kernel(
    p0, p1, p2, p3, context, maxima, sums, B, N, run_length, stride_j, stride_b, stride_n,
    C: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of exp(K - its maximum)^T @ V over a run of tokens, divided where the run is the whole. One image and segment."""
    g, run = tl.program_id(0), tl.program_id(1)
    c, end = _channels(WIDTH, BLOCK)
    one = tl.full((), 1, tl.int64)
    k = _select_pointer(g // B, p0, p1, p2, p3) + ((g % B).to(tl.int64) * stride_b + one * stride_j) * C
    v = k + one * stride_j * C
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    for start in range(run * run_length, tl.minimum(run * run_length + run_length, N), TOKENS):
        n = start + tl.arange(0, TOKENS)
        weight, value = _tokens(k, n, c, end, N, stride_n, C), _tokens(v, n, c, end, N, stride_n, C)
        weight = tl.where((n < N)[:, None], weight, float("-inf"))
        higher = tl.maximum(maximum, tl.max(weight, 0))
        weight, shrink = tl.exp(weight - higher[None, :]), tl.exp(maximum - higher)
        total *= shrink[:, None]
        norm = norm * shrink + tl.sum(weight, 0)
        maximum = higher
        total = tl.dot(tl.trans(weight), value, total, input_precision=PRECISION)
    if WHOLE:
        total = total / norm[:, None]
    index = run * tl.num_programs(0) + g
    offset, inside = _head_blocks(index, c, end, C)
    tl.store(context + offset, total, inside)
    if not WHOLE:
        tl.store(maxima + index * C + c, maximum, c < end)
        tl.store(sums + index * C + c, norm, c < end)


@triton.jit
def _merge_kernel(context, maxima, sums, result, runs, C: tl.constexpr, BLOCK: tl.constexpr):
    """Join the runs of `_context_kernel` and normalise. One image and segment."""
    g, groups = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for run in range(runs):
        highest = tl.maximum(highest, tl.load(maxima + (run * groups + g) * C + c, c < C, 0.0))
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    for run in range(runs):
        shrink = tl.exp(tl.load(maxima + (run * groups + g) * C + c, c < C, 0.0) - highest)
        norm += shrink * tl.load(sums + (run * groups + g) * C + c, c < C, 1.0)
        offset, inside = _head_blocks(run * groups + g, c, C, C)
        total += shrink[:, None] * tl.load(context + offset, inside, 0.0)
    offset, inside = _head_blocks(g, c, C, C)
    tl.store(result + offset, total / norm[:, None], inside)


@triton.jit
def _combine(q, result, context, scale, position, bias, mask, column, c, end, W, PRECISION: tl.constexpr):
    """Store scale * Q @ context + Q * (position + bias)."""
    query = tl.load(q, (mask & (column < W))[:, None] & (c < end)[None, :], 0.0).to(tl.float32)
    attended = tl.dot(query, context, input_precision=PRECISION)
    _store(result, scale * attended + query * (position + bias[None, :]), mask, column, c, end, W)


@triton.jit
def _combine_kernel(
    p0, p1, p2, p3, local, context, position_weights, position_bias, result, scale, strips, run_length, B, H, W, across,
    stride_j, stride_b, stride_n, local_b, local_n,
    C: tl.constexpr, WIDTH: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The attention from its context, into (B, H, W, 5, C): position is the convolution of V. One image and segment, and run.

    The fifth segment is a copy of `local`.
    """
    g, run = tl.program_id(0), tl.program_id(1)
    segment = g // B
    c, end = _channels(WIDTH, BLOCK)
    zero = tl.zeros((STRIPS,), tl.int32)
    b = zero + g % B
    result += segment * C
    first, last = run * run_length, tl.minimum(run * run_length + run_length, strips)
    if segment == 4:
        for start in range(first, last, STRIPS):
            mask, _, y, x = _strips(start, strips, H, across, STRIPS)
            source = _pixels(local, zero, b, y, x, c, W, 0, local_b, local_n, C)
            target = _pixels(result, zero, b, y, x, c, W, 0, H * W * 5, 5, C)
            for r in tl.static_range(4):
                value = tl.load(source + r * local_n * C, (mask & (x + r < W))[:, None] & (c < end)[None, :], 0.0)
                _store(target + r * 5 * C, value, mask, x + r, c, end, W)
    else:
        proxy = _select_pointer(segment, p0, p1, p2, p3)
        offset, inside = _head_blocks(g, c, end, C)
        matrix = tl.load(context + offset, inside, 0.0)
        bias = tl.load(position_bias + segment * C + c, c < end, 0.0).to(tl.float32)
        step = stride_n * C
        for start in range(first, last, STRIPS):
            mask, _, y, x = _strips(start, strips, H, across, STRIPS)
            value = _pixels(proxy, zero + 2, b, y, x, c, W, stride_j, stride_b, stride_n, C)
            s0, s1, s2, s3 = _convolve_segment(
                segment, value, position_weights, mask, y, x, c, end, H, W, step, C, STRIPS, BLOCK
            )
            query = _pixels(proxy, zero, b, y, x, c, W, stride_j, stride_b, stride_n, C)
            target = _pixels(result, zero, b, y, x, c, W, 0, H * W * 5, 5, C)
            _combine(query, target, matrix, scale, s0, bias, mask, x, c, end, W, PRECISION)
            _combine(query + step, target + 5 * C, matrix, scale, s1, bias, mask, x + 1, c, end, W, PRECISION)
            _combine(query + 2 * step, target + 10 * C, matrix, scale, s2, bias, mask, x + 2, c, end, W, PRECISION)
            _combine(query + 3 * step, target + 15 * C, matrix, scale, s3, bias, mask, x + 3, c, end, W, PRECISION)


def _aligned(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return maps of the same strides, multiples of C, whose rows follow each other; copied only where they are not so."""
    *_, H, W, C = maps[0].shape
    strides = maps[0].stride()
    outer = zip(maps[0].shape[:-1], strides[:-1], strict=True)
    fit = strides[-1] == 1 and all(size == 1 or stride % C == 0 for size, stride in outer)
    fit = fit and (H == 1 or W == 1 or strides[-3] == W * strides[-2])
    if fit and all(x.stride() == strides for x in maps):
        return list(maps)
    return [x.contiguous() for x in maps]


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a map (..., H, W, C), those of its tokens last, in units of C."""
    *outer, row, token, _ = x.stride()
    return tuple(stride // x.shape[-1] for stride in (*outer, row if x.shape[-2] == 1 else token))


def _matrix_block(x: Tensor) -> tuple[dict[str, Any], int]:
    """Constants of a kernel that multiplies the matrices of heads, both of a segment in one up to 64 channels; its programs."""
    C = x.shape[-1]
    width = C if C <= 64 else C // 2
    # TF32 holds every float16 and bfloat16 exactly and, unlike float16, the small weights of a softmax over many tokens.
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return {"C": C, "WIDTH": width, "BLOCK": max(16, triton.next_power_of_2(width)), "PRECISION": precision}, C // width


def _run_length(items: int, block: int, programs: int, wanted: int) -> int:
    """Return how many items, whole blocks of them, a program takes, so that `programs` for each run are about `wanted`."""
    blocks = triton.cdiv(items, block)
    return triton.cdiv(blocks, max(1, min(blocks, wanted // programs))) * block


def aggregate_groups(segments: Tensor, kernel_weights: Tensor) -> Tensor:
    """Do what `attention.aggregate_groups` does."""
    S, J, B, H, W, C = segments.shape
    result = segments.new_empty(segments.shape)
    if not result.numel():
        return result
    (segments,) = _aligned([segments])
    block = 16 if C % 32 else 32
    constants = {"C": C, "STRIPS": 32, "BLOCK": block, "num_warps": block // 8, "maxnreg": _MAX_REGISTERS}
    across = triton.cdiv(W, 4)
    strips = J * B * H * across
    grid = (triton.cdiv(strips, constants["STRIPS"]), S, triton.cdiv(C, block))
    sizes = (strips, B, H, W, across, *_strides(segments), J * B * H * W)
    _aggregate_kernel[grid](segments, kernel_weights.contiguous(), result, *sizes, **constants)
    return result


def _context(proxies: Sequence[Tensor]) -> Tensor:
    """Return softmax(K)^T V of the heads of four segments (J, B, H, W, C), of the same strides. (4, B, 2, E, E), float32."""
    _, B, H, W, C = proxies[0].shape
    N, (constants, programs) = H * W, _matrix_block(proxies[0])
    wide = proxies[0].dtype == torch.float32 or constants["BLOCK"] > 64
    constants |= {"TOKENS": 32 if wide else 64, "num_warps": 8 if wide else 4, "num_stages": 2}
    run_length = _run_length(N, constants["TOKENS"], 4 * B * programs, _CONTEXT_PROGRAMS)
    runs = triton.cdiv(N, run_length)
    context = proxies[0].new_empty(runs, 4, B, 2, C // 2, C // 2, dtype=torch.float32)
    maxima, sums = context.new_empty(runs, 4, B, C), context.new_empty(runs, 4, B, C)
    sizes = (B, N, run_length, *_strides(proxies[0]))
    _context_kernel[4 * B, runs, programs](*proxies, context, maxima, sums, *sizes, WHOLE=runs == 1, **constants)
    if runs == 1:
        return context[0]
    result = torch.empty_like(context[0])
    _merge_kernel[(4 * B,)](context, maxima, sums, result, runs, C=C, BLOCK=triton.next_power_of_2(C))
    return result


def attend_segments(
    proxies: Sequence[Tensor], local: Tensor, position_weights: Tensor, position_bias: Tensor, scale: float
) -> Tensor:
    """Do what `attention.attend_segments` does."""
    B, H, W, C = local.shape
    result = proxies[0].new_empty(B, H, W, 5 * C)  # under autocast `local` can be more exact
    if not result.numel():
        return result
    proxies, (local,) = _aligned(proxies), _aligned([local])
    context = _context(proxies)
    (constants, programs), across = _matrix_block(proxies[0]), triton.cdiv(W, 4)
    strips, size = H * across, 32 if constants["BLOCK"] < 64 else 16
    run_length = _run_length(strips, size, 5 * B * programs, _COMBINE_PROGRAMS)
    grid = (5 * B, triton.cdiv(strips, run_length), programs)
    constants |= {"STRIPS": size, "num_warps": size * constants["BLOCK"] // 256}
    constants |= {} if proxies[0].dtype == torch.float32 else {"maxnreg": _MAX_REGISTERS}
    tensors = (*proxies, local, context, position_weights.contiguous(), position_bias.contiguous(), result)
    sizes = (strips, run_length, B, H, W, across, *_strides(proxies[0]), *_strides(local))
    _combine_kernel[grid](*tensors, scale, *sizes, **constants)
    return result
