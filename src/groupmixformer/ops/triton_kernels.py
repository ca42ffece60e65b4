"""The two passes over tokens of Group-Mix Attention as fused GPU kernels, each with a plain PyTorch twin of the same signature.

On a GPU the attention is bound by memory traffic and launches, so each operation makes one pass of what the network otherwise
does in many:

- `aggregate_groups`: the three depthwise convolutions of the group aggregators (Sec. 3), read where the linear layer left Q, K
  and V, written where the pointwise convolutions read them.
- `attend`: softmax(K)^T V with a running maximum, so that K and V are read once; then Q @ context + Q * position for the four
  attention segments, written beside the branch without attention as the projection reads them.

Each is a custom operator (`torch.library`), so autograd, torch.compile and torch.export know it. Its kernels are written in
Triton. They serve NVIDIA GPUs from Ampere on in float32, float16 and bfloat16 and accumulate in float32; other devices, float64
and machines without Triton take plain PyTorch. With TRITON_INTERPRET=1 in the environment Triton's interpreter runs the kernels
on the CPU.

Letters: B batch, H x W feature map, N = H * W tokens, C width of a segment, E = C / 2 width of a head, S segments, J = 3 for Q,
K and V (1 where one of them is meant), T taps: the entries of all depthwise kernels of the S segments. The first segment of an
operation has k = 3, the next k = 5, others k = 7. Maps are S times (J, B, H, W, C), of the same strides, which are multiples of
C; a kernel takes four pointers to them, of which those beyond S repeat the last. `join_taps` makes taps.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# Triton reads the annotations of a kernel itself, so arguments that are no compile-time constants have none.

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Sequence
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

__all__ = ["aggregate_groups", "attend", "join_taps", "plain_aggregate_groups", "plain_attend", "served"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether the network takes them where they serve.
WANTED = os.environ.get("GROUPMIXFORMER_KERNELS") != "0"
WIDEST = 128  # C of a wider segment needs more shared memory than the smallest of these GPUs has
SIZES = (3, 5, 7, 7)  # k of the depthwise kernel, by segment

_known: dict[torch.device, bool] = {}


def _runs_on(device: torch.device) -> bool:
    """Tell whether a GPU is new enough and Triton can start kernels, for which it needs a C compiler and Python's headers."""
    if device not in _known:
        if not torch.cuda.is_available():  # the device of a tensor that is not real
            return False
        _known[device] = torch.cuda.get_device_capability(device) >= (8, 0)
        if _known[device]:
            try:
                triton.runtime.driver.active.get_current_target()
            except Exception as error:  # of a compiler, a linker, a driver
                warnings.warn(
                    f"plain PyTorch takes the place of the fused kernels, which Triton cannot start here ({error}): "
                    "install a C compiler and Python's headers, or set GROUPMIXFORMER_KERNELS=0",
                    stacklevel=2,
                )
                _known[device] = False
    return _known[device]


# A compiler takes the answer as a constant: what torch.compiler.assume_constant_result does, but that imports the compiler.
_runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def served(x: Any) -> bool:
    """Tell whether Triton kernels serve `x`: a tensor on the right device and of the right type, and no proxy of torch.fx."""
    if triton is None or not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if x.is_cuda:
        return torch.version.cuda is not None and _runs_on(x.device)
    return INTERPRETED and x.device.type == "cpu"


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


# Triton. Strides arrive in units of C, so that the compiler sees how addresses are aligned. A convolution is worked out for
# strips of 4 pixels in a row: of 10 neighbours that are loaded for 7 taps each is used up to 4 times. Strips are numbered
# through all images, so that small maps fill blocks too.


@_jit
def _pick(segment, a, b, c, d):
    """One of four pointers."""
    if segment == 1:
        a = b
    elif segment == 2:
        a = c
    elif segment == 3:
        a = d
    return a


@_jit
def _strips(first, strips, H, across, STRIPS: tl.constexpr):
    """Which of the strips there are, and for each its image, row and first column."""
    strip = first + tl.arange(0, STRIPS)
    row = strip // across
    return strip < strips, row // H, row % H, strip % across * 4


@_jit
def _pixels(source, j, b, y, x, c, W, stride_j, stride_b, stride_n, C: tl.constexpr):
    """Addresses of pixels, each with its channels. (STRIPS, BLOCK)."""
    offset = (j.to(tl.int64) * stride_j + b.to(tl.int64) * stride_b + (y * W + x) * stride_n) * C
    return source + offset[:, None] + c[None, :]


@_jit
def _convolve(
    source, taps, held, y, x, c, end, H, W, step, C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr,
    STRIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Neighbours of the pixels at the addresses `source`, weighted by `taps` (K * K, C). 4 x (STRIPS, BLOCK)."""
    zero = tl.zeros((STRIPS, BLOCK), tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    for i in range(K):
        row = y + (i - K // 2)
        there = held & (row >= 0) & (row < H)
        line = source + (i - K // 2) * W * step
        if FLIP:
            weights = taps + (K * K - 1 - i * K) * C + c
        else:
            weights = taps + i * K * C + c
        for j in tl.static_range(K + 3):
            column = x + (j - K // 2)
            inside = (there & (column >= 0) & (column < W))[:, None] & (c < end)[None, :]
            near = tl.load(line + (j - K // 2) * step, inside, 0.0).to(tl.float32)
            if j < K:
                s0 += near * tl.load(weights + (-j if FLIP else j) * C, c < end, 0.0).to(tl.float32)[None, :]
            if j >= 1 and j < K + 1:
                s1 += near * tl.load(weights + (1 - j if FLIP else j - 1) * C, c < end, 0.0).to(tl.float32)[None, :]
            if j >= 2 and j < K + 2:
                s2 += near * tl.load(weights + (2 - j if FLIP else j - 2) * C, c < end, 0.0).to(tl.float32)[None, :]
            if j >= 3:
                s3 += near * tl.load(weights + (3 - j if FLIP else j - 3) * C, c < end, 0.0).to(tl.float32)[None, :]
    return s0, s1, s2, s3


@_jit
def _convolve_segment(
    segment, source, taps, held, y, x, c, end, H, W, step, C: tl.constexpr, FLIP: tl.constexpr, STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution with the segment's own kernel size, from the taps of all segments (T, C)."""
    if segment == 0:
        s0, s1, s2, s3 = _convolve(source, taps, held, y, x, c, end, H, W, step, C, 3, FLIP, STRIPS, BLOCK)
    elif segment == 1:
        s0, s1, s2, s3 = _convolve(source, taps + 9 * C, held, y, x, c, end, H, W, step, C, 5, FLIP, STRIPS, BLOCK)
    else:
        taps += (34 + 49 * (segment - 2)) * C
        s0, s1, s2, s3 = _convolve(source, taps, held, y, x, c, end, H, W, step, C, 7, FLIP, STRIPS, BLOCK)
    return s0, s1, s2, s3


@_jit
def _store(result, value, held, column, c, end, W):
    tl.store(result, value.to(result.dtype.element_ty), (held & (column < W))[:, None] & (c < end)[None, :])


@_jit
def _depthwise_kernel(
    m0, m1, m2, m3, taps, result, strips, B, H, W, across, m_j, m_b, m_n, r_s, r_j, r_b, r_n,
    C: tl.constexpr, FLIP: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One run of strips, segment and block of channels."""
    segment = tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    held, image, y, x = _strips(tl.program_id(0) * STRIPS, strips, H, across, STRIPS)
    source = _pixels(_pick(segment, m0, m1, m2, m3), image // B, image % B, y, x, c, W, m_j, m_b, m_n, C)
    result += segment.to(tl.int64) * r_s * C
    result = _pixels(result, image // B, image % B, y, x, c, W, r_j, r_b, r_n, C)
    s0, s1, s2, s3 = _convolve_segment(segment, source, taps, held, y, x, c, C, H, W, m_n * C, C, FLIP, STRIPS, BLOCK)
    _store(result, s0, held, x, c, C, W)
    _store(result + r_n * C, s1, held, x + 1, c, C, W)
    _store(result + 2 * r_n * C, s2, held, x + 2, c, C, W)
    _store(result + 3 * r_n * C, s3, held, x + 3, c, C, W)


@_jit
def _row_gradient(
    grad, source, partial, i, c, first, last, strips, B, H, W, across, g_j, g_b, g_n, s_j, s_b, s_n,
    C: tl.constexpr, K: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of gradient times neighbour for the K taps of row i."""
    zero = tl.zeros((STRIPS, BLOCK), tl.float32)
    t0, t1, t2, t3, t4, t5, t6 = zero, zero, zero, zero, zero, zero, zero
    for start in range(first, last, STRIPS):
        held, image, y, x = _strips(start, strips, H, across, STRIPS)
        here = _pixels(grad, image // B, image % B, y, x, c, W, g_j, g_b, g_n, C)
        g0 = tl.load(here, held[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
        g1 = tl.load(here + g_n * C, (held & (x + 1 < W))[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
        g2 = tl.load(here + 2 * g_n * C, (held & (x + 2 < W))[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
        g3 = tl.load(here + 3 * g_n * C, (held & (x + 3 < W))[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
        row = y + (i - K // 2)
        there = held & (row >= 0) & (row < H)
        line = _pixels(source, image // B, image % B, row, x, c, W, s_j, s_b, s_n, C)
        for j in tl.static_range(K + 3):
            column = x + (j - K // 2)
            inside = (there & (column >= 0) & (column < W))[:, None] & (c < C)[None, :]
            near = tl.load(line + (j - K // 2) * s_n * C, inside, 0.0).to(tl.float32)
            for r in tl.static_range(4):
                g = g0
                if r == 1:
                    g = g1
                elif r == 2:
                    g = g2
                elif r == 3:
                    g = g3
                if j - r == 0:
                    t0 += near * g
                elif j - r == 1:
                    t1 += near * g
                elif j - r == 2:
                    t2 += near * g
                elif j - r == 3 and K > 3:
                    t3 += near * g
                elif j - r == 4 and K > 3:
                    t4 += near * g
                elif j - r == 5 and K > 5:
                    t5 += near * g
                elif j - r == 6 and K > 5:
                    t6 += near * g
    partial += i * K * C + c
    tl.store(partial, tl.sum(t0, 0), c < C)
    tl.store(partial + C, tl.sum(t1, 0), c < C)
    tl.store(partial + 2 * C, tl.sum(t2, 0), c < C)
    if K > 3:
        tl.store(partial + 3 * C, tl.sum(t3, 0), c < C)
        tl.store(partial + 4 * C, tl.sum(t4, 0), c < C)
    if K > 5:
        tl.store(partial + 5 * C, tl.sum(t5, 0), c < C)
        tl.store(partial + 6 * C, tl.sum(t6, 0), c < C)


@_jit
def _taps_gradient_kernel(
    g0, g1, g2, g3, m0, m1, m2, m3, partial, strips, run_length, B, H, W, across, T, g_j, g_b, g_n, m_j, m_b, m_n,
    C: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One run of strips, row of one segment's taps and block of channels."""
    run, row = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first, last = run * run_length, tl.minimum(run * run_length + run_length, strips)
    partial += run.to(tl.int64) * T * C
    if row < 3:
        _row_gradient(
            g0, m0, partial, row, c, first, last, strips, B, H, W, across, g_j, g_b, g_n, m_j, m_b, m_n, C, 3, STRIPS, BLOCK
        )
    elif row < 8:
        partial += 9 * C
        row -= 3
        _row_gradient(
            g1, m1, partial, row, c, first, last, strips, B, H, W, across, g_j, g_b, g_n, m_j, m_b, m_n, C, 5, STRIPS, BLOCK
        )
    else:
        segment = 2 + (row - 8) // 7
        partial += (34 + 49 * (segment - 2)) * C
        row = (row - 8) % 7
        g, m = _pick(segment, g0, g1, g2, g3), _pick(segment, m0, m1, m2, m3)
        _row_gradient(
            g, m, partial, row, c, first, last, strips, B, H, W, across, g_j, g_b, g_n, m_j, m_b, m_n, C, 7, STRIPS, BLOCK
        )


# A segment has two heads. Their matrices (E, E) are the blocks on the diagonal of one (C, C), which tensor cores work out in
# one, unless it is too large for that. WIDTH is C or E.


@_jit
def _channels(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of the segment that a program takes, and their end."""
    first = tl.program_id(2) * WIDTH
    return first + tl.arange(0, BLOCK), first + WIDTH


@_jit
def _heads_of(index, c, end, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Offsets of the diagonal blocks within matrices (2, E, E), and what is inside them. (BLOCK, BLOCK)."""
    E: tl.constexpr = C // 2
    inside = (c < end)[:, None] & (c < end)[None, :] & ((c // E)[:, None] == (c // E)[None, :])
    if TRANSPOSED:
        offset = (c % E)[:, None] + (c * E)[None, :]
    else:
        offset = (c * E)[:, None] + (c % E)[None, :]
    return index.to(tl.int64) * C * E + offset, inside


@_jit
def _tokens(source, n, c, end, N, stride_n, C: tl.constexpr):
    """Rows of a token matrix, zero beyond the last, in float32. (TOKENS, BLOCK)."""
    return tl.load(source + (n * stride_n * C)[:, None] + c[None, :], (n < N)[:, None] & (c < end)[None, :], 0.0).to(tl.float32)


@_jit
def _product_kernel(
    l0, l1, l2, l3, r0, r1, r2, r3, product, maxima, sums, B, N, run_length, l_b, l_n, r_b, r_n,
    C: tl.constexpr, WIDTH: tl.constexpr, SOFTMAX: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """left^T @ right over a run of tokens, or exp(left - its maximum)^T @ right, normalised where the run is the whole."""
    g, run = tl.program_id(0), tl.program_id(1)
    c, end = _channels(WIDTH, BLOCK)
    left = _pick(g // B, l0, l1, l2, l3) + (g % B).to(tl.int64) * l_b * C
    right = _pick(g // B, r0, r1, r2, r3) + (g % B).to(tl.int64) * r_b * C
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    for start in range(run * run_length, tl.minimum(run * run_length + run_length, N), TOKENS):
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
    if SOFTMAX and WHOLE:
        total = total / norm[:, None]
    index = run * tl.num_programs(0) + g
    offset, inside = _heads_of(index, c, end, C, False)
    tl.store(product + offset, total, inside)
    if SOFTMAX:
        tl.store(maxima + index * C + c, maximum, c < end)
        tl.store(sums + index * C + c, norm, c < end)


@_jit
def _merge_kernel(product, maxima, sums, result, maximum, norm, runs, C: tl.constexpr, BLOCK: tl.constexpr):
    """Join the runs of `_product_kernel` and normalise. One image and segment."""
    g, groups = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for run in range(runs):
        highest = tl.maximum(highest, tl.load(maxima + (run * groups + g) * C + c, c < C, 0.0))
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for run in range(runs):
        shrink = tl.exp(tl.load(maxima + (run * groups + g) * C + c, c < C, 0.0) - highest)
        count += shrink * tl.load(sums + (run * groups + g) * C + c, c < C, 1.0)
        offset, inside = _heads_of(run * groups + g, c, C, C, False)
        total += shrink[:, None] * tl.load(product + offset, inside, 0.0)
    offset, inside = _heads_of(g, c, C, C, False)
    tl.store(result + offset, total / count[:, None], inside)
    tl.store(maximum + g * C + c, highest, c < C)
    tl.store(norm + g * C + c, count, c < C)


@_jit
def _context_backward_kernel(
    grad, result, maximum, norm, k0, k1, k2, k3, v0, v1, v2, v3, dk, dv, B, N, run_length, k_b, k_n,
    C: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P = softmax(K), dV += P @ grad, dK = P * (V @ grad^T - sum of grad * result). One image and segment, and run."""
    g, run = tl.program_id(0), tl.program_id(1)
    c, end = _channels(WIDTH, BLOCK)
    offset, inside = _heads_of(g, c, end, C, False)
    matrix = tl.load(grad + offset, inside, 0.0)
    shift = tl.sum(matrix * tl.load(result + offset, inside, 0.0), 1)
    highest = tl.load(maximum + g * C + c, c < end, 0.0)
    count = tl.load(norm + g * C + c, c < end, 1.0)
    k = _pick(g // B, k0, k1, k2, k3) + (g % B).to(tl.int64) * k_b * C
    v = _pick(g // B, v0, v1, v2, v3) + (g % B).to(tl.int64) * k_b * C
    # Of the gradients (4, 3, B, N, C), in which K and V of a segment follow Q.
    place = (g // B * 3 * B + g % B).to(tl.int64) * N * C
    dk += place
    dv += place
    for start in range(run * run_length, tl.minimum(run * run_length + run_length, N), TOKENS):
        n = start + tl.arange(0, TOKENS)
        # A row beyond the last token may be infinite; it meets no other row and is not stored.
        weight = tl.exp(_tokens(k, n, c, end, N, k_n, C) - highest[None, :]) / count[None, :]
        to_v = tl.dot(weight, matrix, _tokens(dv, n, c, end, N, 1, C), input_precision=PRECISION)
        to_k = tl.dot(_tokens(v, n, c, end, N, k_n, C), tl.trans(matrix), input_precision=PRECISION)
        at, held = (n * C)[:, None] + c[None, :], (n < N)[:, None] & (c < end)[None, :]
        tl.store(dv + at, to_v.to(dv.dtype.element_ty), held)
        tl.store(dk + at, (weight * (to_k - shift[None, :])).to(dk.dtype.element_ty), held)


@_jit
def _mix(q, result, mixing, scale, position, shift, held, column, c, end, W, PRECISION: tl.constexpr):
    """Store scale * Q @ mixing + Q * (position + shift)."""
    query = tl.load(q, (held & (column < W))[:, None] & (c < end)[None, :], 0.0).to(tl.float32)
    attended = tl.dot(query, mixing, input_precision=PRECISION)
    _store(result, scale * attended + query * (position + shift[None, :]), held, column, c, end, W)


@_jit
def _combine_kernel(
    q0, q1, q2, q3, v0, v1, v2, v3, local, matrix, taps, bias, result, scale, strips, run_length, B, H, W, across,
    q_b, q_n, v_b, v_n, l_b, l_n, r_s, r_b, r_n,
    C: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention: scale * Q @ matrix + Q * (convolution of V + bias). One image and segment, and run of strips.

    A fifth segment is a copy of `local`.
    """
    g, run = tl.program_id(0), tl.program_id(1)
    segment, b = g // B, g % B
    c, end = _channels(WIDTH, BLOCK)
    nothing = tl.zeros((STRIPS,), tl.int32)
    result += segment.to(tl.int64) * r_s * C
    first, last = run * run_length, tl.minimum(run * run_length + run_length, strips)
    if segment == 4:
        for start in range(first, last, STRIPS):
            held, _, y, x = _strips(start, strips, H, across, STRIPS)
            source = _pixels(local, nothing, nothing + b, y, x, c, W, 0, l_b, l_n, C)
            target = _pixels(result, nothing, nothing + b, y, x, c, W, 0, r_b, r_n, C)
            for r in tl.static_range(4):
                value = tl.load(source + r * l_n * C, (held & (x + r < W))[:, None] & (c < end)[None, :], 0.0)
                _store(target + r * r_n * C, value, held, x + r, c, end, W)
    else:
        q, v = _pick(segment, q0, q1, q2, q3), _pick(segment, v0, v1, v2, v3)
        offset, inside = _heads_of(g, c, end, C, TRANSPOSED)
        mixing = tl.load(matrix + offset, inside, 0.0)
        shift = tl.load(bias + segment * C + c, c < end, 0.0).to(tl.float32)
        for start in range(first, last, STRIPS):
            held, _, y, x = _strips(start, strips, H, across, STRIPS)
            value = _pixels(v, nothing, nothing + b, y, x, c, W, 0, v_b, v_n, C)
            s0, s1, s2, s3 = _convolve_segment(segment, value, taps, held, y, x, c, end, H, W, v_n * C, C, False, STRIPS, BLOCK)
            query = _pixels(q, nothing, nothing + b, y, x, c, W, 0, q_b, q_n, C)
            target = _pixels(result, nothing, nothing + b, y, x, c, W, 0, r_b, r_n, C)
            _mix(query, target, mixing, scale, s0, shift, held, x, c, end, W, PRECISION)
            _mix(query + q_n * C, target + r_n * C, mixing, scale, s1, shift, held, x + 1, c, end, W, PRECISION)
            _mix(query + 2 * q_n * C, target + 2 * r_n * C, mixing, scale, s2, shift, held, x + 2, c, end, W, PRECISION)
            _mix(query + 3 * q_n * C, target + 3 * r_n * C, mixing, scale, s3, shift, held, x + 3, c, end, W, PRECISION)


# Plain PyTorch, differentiable.


def _accumulated(x: Tensor) -> Tensor:
    """Return `x` in the type of sums over many tokens."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def join_taps(weights: Sequence[Tensor]) -> Tensor:
    """Join depthwise kernels (C, 1, k, k), with k = 3, 5, 7, 7, into taps (T, C), which kernels read a row at a time."""
    return torch.cat([weight.flatten(1).t() for weight in weights])


def _weights(taps: Tensor) -> list[Tensor]:
    """Cut taps into depthwise kernels."""
    sizes = SIZES if len(taps) > 83 else SIZES[:3]
    parts = taps.split([k * k for k in sizes])
    return [part.t().reshape(-1, 1, k, k) for part, k in zip(parts, sizes, strict=True)]


def _depthwise(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Convolve each of S maps (J, B, H, W, C) with its kernel (C, 1, k, k), without bias. (S, J, B, H, W, C)."""
    results = []
    for x, weight in zip(maps, weights, strict=True):
        stacked = x.flatten(0, 1).permute(0, 3, 1, 2)  # (JB, C, H, W)
        results.append(F.conv2d(stacked, weight.to(x.dtype), padding=weight.shape[-1] // 2, groups=len(weight)))
    return torch.stack(results).permute(0, 1, 3, 4, 2).unflatten(1, maps[0].shape[:2]).contiguous()


def plain_aggregate_groups(segments: Tensor, taps: Tensor) -> Tensor:
    """Do what `aggregate_groups` does."""
    return _depthwise(segments.unbind(0), _weights(taps))


def _plain_context(k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(K)^T V: one product serves both heads, of which the blocks on the diagonal are kept. (S, B, N, C)."""
    product = k.softmax(2).transpose(2, 3) @ v  # (S, B, C, C)
    blocks = product.unflatten(3, (2, -1)).unflatten(2, (2, -1))  # (S, B, 2, E, 2, E)
    return _accumulated(blocks.diagonal(dim1=2, dim2=4).movedim(4, 2).contiguous())  # (S, B, 2, E, E)


def _plain_combine(q: Tensor, v: Tensor, context: Tensor, taps: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return scale * Q @ context + Q * (convolution of V + bias). Q, V and the result are (S, B, H, W, C)."""
    shift = bias.to(q.dtype)[:, None, None, None]  # (S, 1, 1, 1, C)
    position = _depthwise(v[:, None].unbind(0), _weights(taps))[:, 0] + shift  # (S, B, H, W, C)
    blocks = torch.diag_embed((scale * context).to(q.dtype).movedim(2, 4))  # (S, B, E, E, 2, 2)
    attended = q.flatten(2, 3) @ blocks.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)  # (S, B, N, C)
    return torch.addcmul(attended.view_as(position), q, position)


def plain_attend(proxies: Sequence[Tensor], local: Tensor, taps: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Do what `attend` does."""
    q, k, v = torch.stack(list(proxies)).unbind(1)  # 3 x (4, B, H, W, C)
    context = _plain_context(k.flatten(2, 3), v.flatten(2, 3))
    mixed = _plain_combine(q, v, context, taps, bias, scale)
    return torch.cat([*mixed, local], dim=3)  # (B, H, W, 5C)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(3, (2, -1)).transpose(2, 3)  # (S, B, 2, N, E)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(2, 3).flatten(3)  # (S, B, N, C)


# Each step runs as a kernel where `served`, otherwise in plain PyTorch. Sizes of blocks were chosen on an H200, so that a block
# stays within registers and shared memory.


def _maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return maps of the same strides, multiples of C, whose rows follow each other; copied only where they are not so."""
    *_, H, W, C = maps[0].shape
    strides = maps[0].stride()
    outer = zip(maps[0].shape[:-1], strides[:-1], strict=True)
    fit = strides[-1] == 1 and all(size == 1 or stride % C == 0 for size, stride in outer)
    fit = fit and (H == 1 or W == 1 or strides[-3] == W * strides[-2])
    if fit and all(x.stride() == strides for x in maps):
        return list(maps)
    return [x.contiguous() for x in maps]


def _four(maps: Sequence[Tensor]) -> list[Tensor]:
    return [*maps, *[maps[-1]] * (4 - len(maps))]


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a map (..., H, W, C), of its tokens at last, in units of C."""
    *outer, row, token, _ = x.stride()
    return tuple(stride // x.shape[-1] for stride in (*outer, row if x.shape[-2] == 1 else token))


def _channel_block(C: int) -> dict[str, int]:
    """Constants of a kernel that takes channels by blocks."""
    block = 16 if C % 32 else 32
    return {"C": C, "STRIPS": 32, "BLOCK": block, "num_warps": block // 8, "maxnreg": 128}


def _matrix_block(x: Tensor) -> tuple[dict[str, Any], int]:
    """Constants of a kernel that multiplies the matrices of heads, both of a segment in one up to 64 channels; its programs."""
    C = x.shape[-1]
    width = C if C <= 64 else C // 2
    # TF32 holds every float16 and bfloat16 exactly and, unlike float16, the small weights of a softmax over many tokens.
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return {"C": C, "WIDTH": width, "BLOCK": max(16, triton.next_power_of_2(width)), "PRECISION": precision}, C // width


def _token_block(x: Tensor) -> tuple[dict[str, Any], int]:
    """Do the same for a kernel that goes by tokens."""
    exact = x.dtype == torch.float32
    constants, programs = _matrix_block(x)
    wide = exact or constants["BLOCK"] > 64
    return {**constants, "TOKENS": 32 if wide else 64, "num_warps": 8 if wide else 4, "num_stages": 2}, programs


def _run_length(blocks: int, block: int, programs: int, wanted: int) -> int:
    """Return how many items of `blocks` blocks a program takes, so that about `wanted` programs run."""
    return triton.cdiv(blocks, max(1, min(blocks, wanted // programs))) * block


def _convolve_maps(maps: Sequence[Tensor], taps: Tensor, result: Tensor, flip: bool = False) -> Tensor:
    """Convolve into `result` (S, J, B, H, W, C); with flipped kernels this is the gradient of a convolution's input."""
    S, J, B, H, W, C = result.shape
    if not served(maps[0]):
        return result.copy_(_depthwise(maps, [w.flip(2, 3) if flip else w for w in _weights(taps)]))
    maps, taps = _maps(maps), taps.contiguous()
    constants = _channel_block(C)
    across = triton.cdiv(W, 4)
    strips = J * B * H * across
    grid = (triton.cdiv(strips, constants["STRIPS"]), S, triton.cdiv(C, constants["BLOCK"]))
    sizes = (strips, B, H, W, across, *_strides(maps[0]), *_strides(result))
    _depthwise_kernel[grid](*_four(maps), taps, result, *sizes, FLIP=flip, **constants)
    return result


def _taps_gradient(grads: Sequence[Tensor], maps: Sequence[Tensor], taps: Tensor) -> Tensor:
    """Return the gradient of the taps (T, C) with which `maps` were convolved."""
    J, B, H, W, C = maps[0].shape
    if not served(maps[0]):
        result = []
        for g, x, weight in zip(grads, maps, _weights(taps), strict=True):
            g, x = (t.flatten(0, 1).permute(0, 3, 1, 2) for t in (g, x))  # (JB, C, H, W)
            padding = weight.shape[-1] // 2
            result.append(conv2d_weight(x, weight.shape, g, padding=padding, groups=C))
        return join_taps(result).to(taps.dtype)
    grads, maps = _maps(grads), _maps(maps)
    constants = _channel_block(C)
    across = triton.cdiv(W, 4)
    strips, rows, blocks = J * B * H * across, sum(SIZES[: len(maps)]), triton.cdiv(C, constants["BLOCK"])
    run_length = _run_length(triton.cdiv(strips, constants["STRIPS"]), constants["STRIPS"], rows * blocks, 1056)
    runs = triton.cdiv(strips, run_length)
    partial = maps[0].new_empty(runs, *taps.shape, dtype=torch.float32)
    sizes = (strips, run_length, B, H, W, across, len(taps), *_strides(grads[0]), *_strides(maps[0]))
    _taps_gradient_kernel[runs, rows, blocks](*_four(grads), *_four(maps), partial, *sizes, **constants)
    return partial.sum(0).to(taps.dtype)


def _products(left: Sequence[Tensor], right: Sequence[Tensor], softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return left^T @ right of each head of S maps (B, H, W, C) over runs of tokens (runs, S, B, 2, E, E).

    With softmax the left's maxima and sums (runs, S, B, C) beside it, and products normalised if there is one run.
    """
    left, right = _maps(left), _maps(right)
    S, (B, H, W, C) = len(left), left[0].shape
    N, (constants, programs) = H * W, _token_block(left[0])
    run_length = _run_length(triton.cdiv(N, constants["TOKENS"]), constants["TOKENS"], S * B * programs, 1056)
    runs = triton.cdiv(N, run_length)
    product = left[0].new_empty(runs, S, B, 2, C // 2, C // 2, dtype=torch.float32)
    maxima, sums = product.new_empty(runs, S, B, C), product.new_empty(runs, S, B, C)
    sizes = (B, N, run_length, *_strides(left[0]), *_strides(right[0]))
    tensors = (*_four(left), *_four(right), product, maxima, sums)
    _product_kernel[S * B, runs, programs](*tensors, *sizes, SOFTMAX=softmax, WHOLE=runs == 1, **constants)
    return product, maxima, sums


def _combine_maps(
    q: Sequence[Tensor], v: Sequence[Tensor], local: Tensor | None, matrix: Tensor, taps: Tensor, bias: Tensor, scale: float,
    result: Tensor, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """Write scale * Q @ matrix + Q * (convolution of V + bias) into `result` (S, B, H, W, C), `local` as the last."""
    B, H, W, _ = q[0].shape
    if not served(q[0]):
        mixing = matrix.transpose(3, 4) if transposed else matrix
        mixed = _plain_combine(torch.stack(list(q)), torch.stack(list(v)), mixing, taps, bias, scale)
        return result.copy_(torch.cat([mixed, *([] if local is None else [local[None]])]))
    q, v = _maps(q), _maps(v)
    (other,) = _maps([q[0] if local is None else local])
    (constants, programs), across = _matrix_block(q[0]), triton.cdiv(W, 4)
    strips, size = H * across, 32 if constants["BLOCK"] < 64 else 16
    run_length = _run_length(triton.cdiv(strips, size), size, len(result) * B * programs, 2112)
    grid = (len(result) * B, triton.cdiv(strips, run_length), programs)
    sizes = (strips, run_length, B, H, W, across, *_strides(q[0]), *_strides(v[0]), *_strides(other), *_strides(result))
    constants |= {"TRANSPOSED": transposed, "STRIPS": size, "num_warps": size * constants["BLOCK"] // 256}
    constants |= {} if q[0].dtype == torch.float32 else {"maxnreg": 128}
    tensors = (*_four(q), *_four(v), other, matrix.contiguous(), taps.contiguous(), bias.contiguous(), result)
    _combine_kernel[grid](*tensors, scale, *sizes, **constants)
    return result


# The operators. A backward pass is an operator too: compilers look at no kernel.


def _operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def on_its_device(x: Tensor, *inputs: Any) -> Any:  # Triton starts kernels on the current one
            with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
                return function(x, *inputs)

        return torch.library.custom_op(f"groupmixformer::{name}", on_its_device, mutates_args=())

    return register


@_operator("aggregate_groups")
def _aggregate_groups(maps: Tensor, taps: Tensor) -> Tensor:
    return _convolve_maps(maps.unbind(0), taps, maps.new_empty(maps.shape))


@_aggregate_groups.register_fake
def _(maps: Tensor, taps: Tensor) -> Tensor:
    return maps.new_empty(maps.shape)


def _empty_as_tokens(maps: Tensor) -> Tensor:
    """Return an empty (S, J, B, H, W, C) that lies in memory as the linear layer writes it."""
    S, J, B, H, W, C = maps.shape
    return maps.new_empty(B, H, W, J, S, C).permute(4, 3, 0, 1, 2, 5)


@_operator("aggregate_groups_backward")
def _aggregate_groups_backward(grad: Tensor, maps: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    to_maps = _convolve_maps(grad.unbind(0), taps, _empty_as_tokens(maps), flip=True)
    return to_maps, _taps_gradient(grad.unbind(0), maps.unbind(0), taps)


@_aggregate_groups_backward.register_fake
def _(grad: Tensor, maps: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_as_tokens(maps), torch.empty_like(taps)


@_operator("attend")
def _attend(
    single: Tensor, group3: Tensor, group5: Tensor, group7: Tensor, local: Tensor, taps: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    proxies = (single, group3, group5, group7)
    q, k, v = ([proxy[j] for proxy in proxies] for j in range(3))
    if served(single):
        product, maxima, sums = _products(k, v, softmax=True)
        context, maximum, norm = product[0], maxima[0], sums[0]
        if len(product) > 1:
            context, maximum, norm = torch.empty_like(context), torch.empty_like(maximum), torch.empty_like(norm)
            C = single.shape[-1]
            tensors = (product, maxima, sums, context, maximum, norm)
            _merge_kernel[(4 * single.shape[1],)](*tensors, len(product), C=C, BLOCK=triton.next_power_of_2(C))
    else:
        keys, values = (torch.stack(x).flatten(2, 3) for x in (k, v))  # (4, B, N, C)
        maximum = _accumulated(keys.amax(2))
        context, norm = _plain_context(keys, values), (_accumulated(keys) - maximum[:, :, None]).exp().sum(2)
    B, H, W, C = local.shape
    result = single.new_empty(B, H, W, 5, C)  # under autocast `local` can be more exact
    _combine_maps(q, v, local, context, taps, bias, scale, result.permute(3, 0, 1, 2, 4))
    return result, context, maximum, norm


@_attend.register_fake
def _(
    single: Tensor, group3: Tensor, group5: Tensor, group7: Tensor, local: Tensor, taps: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, W, C = local.shape
    context = _accumulated(single.new_empty(4, B, 2, C // 2, C // 2))
    return single.new_empty(B, H, W, 5, C), context, context.new_empty(4, B, C), context.new_empty(4, B, C)


@_operator("attend_backward")
def _attend_backward(
    grad: Tensor, single: Tensor, group3: Tensor, group5: Tensor, group7: Tensor, taps: Tensor, bias: Tensor, context: Tensor,
    maximum: Tensor, norm: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    proxies = (single, group3, group5, group7)
    q, k, v = ([proxy[j] for proxy in proxies] for j in range(3))
    _, B, H, W, C = single.shape
    grads = list(grad.unbind(3)[:4])  # 4 x (B, H, W, C)
    result = single.new_empty(4, 3, B, H, W, C)
    dq, dk, dv = result.unbind(1)
    _combine_maps(grads, v, None, context, taps, bias, scale, dq, transposed=True)  # the same function, of the gradient
    to_position = single.new_empty(4, 1, B, H, W, C)
    for segment, g, x in zip(to_position, grads, q, strict=True):
        torch.mul(g, x, out=segment[0])
    _convolve_maps(to_position.unbind(0), taps, dv[:, None], flip=True)
    to_taps = _taps_gradient(to_position.unbind(0), [x[None] for x in v], taps)
    to_bias = to_position.sum((1, 2, 3, 4), dtype=context.dtype).to(bias.dtype)  # (4, C)
    if served(single):
        to_context = scale * _products(q, grads, softmax=False)[0].sum(0)  # (4, B, 2, E, E)
        both = _maps([*k, *v])
        N, (constants, programs) = H * W, _token_block(single)
        run_length = _run_length(triton.cdiv(N, constants["TOKENS"]), constants["TOKENS"], 4 * B * programs, 2112)
        tensors = (to_context, context, maximum, norm, *both, dk, dv)
        grid, sizes = (4 * B, triton.cdiv(N, run_length), programs), (B, N, run_length, *_strides(both[0]))
        _context_backward_kernel[grid](*tensors, *sizes, **constants)
    else:
        queries, keys, values, gradients = (torch.stack(x).flatten(2, 3) for x in (q, k, v, grads))  # (4, B, N, C)
        to_context = scale * (_heads(_accumulated(queries)).transpose(3, 4) @ _heads(_accumulated(gradients)))
        weight = _heads((_accumulated(keys) - maximum[:, :, None]).exp() / norm[:, :, None])  # (4, B, 2, N, E)
        shift = (to_context * context).sum(4)[:, :, :, None]
        to_k = weight * (_heads(_accumulated(values)) @ to_context.transpose(3, 4) - shift)
        dk.copy_(_joined(to_k).view_as(dk))
        dv.add_(_joined(weight @ to_context).view_as(dv).to(dv.dtype))
    return result, to_taps, to_bias


@_attend_backward.register_fake
def _(
    grad: Tensor, single: Tensor, group3: Tensor, group5: Tensor, group7: Tensor, taps: Tensor, bias: Tensor, context: Tensor,
    maximum: Tensor, norm: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return single.new_empty(4, *single.shape), torch.empty_like(taps), torch.empty_like(bias)


def _keep_for_groups(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _keep_for_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *proxies, local, taps, bias, scale = inputs
    ctx.save_for_backward(*proxies, taps, bias, *output[1:])
    ctx.scale, ctx.type_of_local = scale, local.dtype
    ctx.mark_non_differentiable(*output[1:])


def _attend_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    to_proxies, to_taps, to_bias = _attend_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *to_proxies.unbind(0), grad[:, :, :, 4].to(ctx.type_of_local), to_taps, to_bias, None


_aggregate_groups.register_autograd(
    lambda ctx, grad: _aggregate_groups_backward(grad, *ctx.saved_tensors), setup_context=_keep_for_groups
)
_attend.register_autograd(_attend_gradients, setup_context=_keep_for_attend)


def aggregate_groups(segments: Tensor, taps: Tensor) -> Tensor:
    """Aggregate Q, K and V over 3 x 3, 5 x 5 and 7 x 7 neighbours: the depthwise convolutions of three segments (Sec. 3).

    Args:
        segments: Segments 1 to 3 of Q, K and V (3, J, B, H, W, C), a view of what the linear layer wrote.
        taps: Their depthwise kernels, the same for Q, K and V (83, C).

    Returns:
        (3, J, B, H, W, C), contiguous.
    """
    return _aggregate_groups(segments, taps)


def attend(proxies: Sequence[Tensor], local: Tensor, taps: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attend with the four segments and their relative position encoding, beside the branch without attention (Sec. 3).

    For each segment scale * Q @ context + Q * (convolution of V + bias), where context = softmax(K)^T V of each of its two
    heads; the softmax is taken over the tokens. The context is in float32 at least: it is small, and its gradient, a sum over
    all tokens, can exceed what float16 holds.

    Args:
        proxies: Of each segment Q, K and V (3, B, H, W, C), in memory all alike.
        local: What the branch without attention gives (B, H, W, C).
        taps: The depthwise kernels of the position encoding (132, C).
        bias: Their biases (4, C).
        scale: Factor of the attention, not of the position encoding.

    Returns:
        (B, H, W, 5C): the segments side by side, `local` at last.
    """
    kind = functools.reduce(torch.promote_types, [proxy.dtype for proxy in proxies])  # norms can differ under autocast
    return _attend(*(proxy.to(kind) for proxy in proxies), local, taps, bias, scale)[0].flatten(3)
