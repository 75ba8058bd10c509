"""The kernels of the Triton backend and their pinned block sizes; `triton` launches them.

Shared conventions: sequences are contiguous ``[B, T, D]`` fp32; ``layout[S, FIELDS]`` holds, per scale, its
length, the offset of its tokens, its codebook, its table, its phi kernel and that kernel's width. The
layout's integer type is the type of all index arithmetic: the host makes it int64 where ``T * length`` needs
it. A table ``[K, TAPS, D]`` holds what one code adds to a frame, per tap of phi (see `table_kernel`)."""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(6)
LENGTH, OFFSET, BOOK, PAIR, PHI, WIDTH = (tl.constexpr(field) for field in range(6))


# Pinned block sizes, tokens x codes x channels of a dot product: the largest of those tried that spill
# nothing. Autotuning is no option, it would time itself inside a user's training step.
SEARCH = {  # by major compute capability; 8 includes GPUs with 99 KB of shared memory
    8: {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    9: {"BLOCK_M": 16, "BLOCK_N": 256, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    10: {"BLOCK_M": 16, "BLOCK_N": 256, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}
TABLE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
PHI_GRAD = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}


def search_blocks(capability: int, dim: int) -> dict[str, int]:
    """The entry of `SEARCH` for a major compute capability, that of the oldest one if it is not listed."""
    rows = row_blocks(dim)
    return SEARCH.get(capability, SEARCH[8]) | {"BLOCK_D": rows["BLOCK_D"], "BLOCK_T": rows["BLOCK_M"]}


def row_blocks(dim: int) -> dict[str, int]:
    """Blocks of frames, for kernels without a dot product; wide rows come fewer at a time to stay in
    registers."""
    width = triton.next_power_of_2(dim)
    return {"BLOCK_D": width, "BLOCK_M": max(1, min(16, 1024 // width)), "num_warps": 8}


def step_blocks(dim: int, length: int, following: int) -> dict[str, int]:
    """Of a step to a scale of ``following`` tokens: about as many in a block as a block of frames has windows."""
    rows = row_blocks(dim)
    tokens = triton.next_power_of_2(max(rows["BLOCK_M"] * following // length, 1))
    return rows | {"BLOCK_I": min(tokens, rows["BLOCK_M"])}


@triton.jit
def _pool(rows, mask, i, n, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Means of ``rows[T, D]`` over the windows of tokens ``i`` of ``n``, and how many frames each one
    sees."""
    d = tl.arange(0, BLOCK_D)
    start = i * length // n
    stop = ((i + 1) * length + n - 1) // n
    total = tl.zeros([i.shape[0], BLOCK_D], tl.float32)
    count = tl.zeros([i.shape[0]], tl.float32)
    widest = tl.where(length % n == 0, length // n, length // n + 2)
    for j in range(widest):
        t = start + j
        seen = (t < stop) & (i < n)
        if mask is not None:
            seen = seen & tl.load(mask + t, mask=seen, other=False)
        total += tl.load(rows + t[:, None] * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
        count += seen.to(tl.float32)
    return total / tl.maximum(count, 1.0)[:, None], count


@triton.jit
def _search(
    rows, book, norms, i, n, size, D: tl.constexpr, COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Index of the row of ``book[size, D]`` nearest to each of ``rows[i]``, and its distance, less the row's own
    square."""
    scale = tl.full([i.shape[0]], -2.0, tl.float32)
    if COSINE:
        channel = tl.arange(0, BLOCK_D)
        seen = (i < n)[:, None] & (channel < D)[None, :]
        row = tl.load(rows + i[:, None] * D + channel[None, :], mask=seen, other=0.0)
        scale = scale / tl.maximum(tl.sqrt(tl.sum(row * row, 1)), 1e-12)
    best = tl.full([i.shape[0]], float("inf"), tl.float32)
    nearest = tl.zeros([i.shape[0]], tl.int32)
    dots = tl.zeros([i.shape[0], BLOCK_N], tl.float32)
    slices: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    # One loop over code blocks and channel slices, so that loads run ahead across blocks. The rows are read
    # again in slices: held whole, as fp32 operands of a dot product, they would fill the registers.
    for step in range(tl.cdiv(size, BLOCK_N) * slices):
        start = step // slices * BLOCK_N
        code = start + tl.arange(0, BLOCK_N)
        d = step % slices * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(rows + i[:, None] * D + d[None, :], mask=(i < n)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(
            book + code[None, :] * D + d[:, None], mask=(code < size)[None, :] & (d < D)[:, None], other=0.0
        )
        dots = tl.dot(a, b, dots, input_precision="ieee")
        if step % slices == slices - 1:
            norm = tl.load(norms + code, mask=code < size, other=float("inf"))
            distance = norm[None, :] + scale[:, None] * dots
            low, first = tl.min(distance, 1, return_indices=True, return_indices_tie_break_left=True)
            nearest = tl.where(low < best, start + first, nearest)
            best = tl.where(low < best, low, best)
            dots = tl.zeros([i.shape[0], BLOCK_N], tl.float32)
    return nearest, best


@triton.jit
def _left_and_right(position, n, length):
    """Linear interpolation of ``n`` tokens at a frame: the two tokens and the weight of the right one.

    In integers up to the last division, so that it is exact at any length.
    """
    twice = tl.maximum((2 * position + 1) * n - length, 0)
    left = tl.minimum(twice // (2 * length), n - 1)
    return (
        left,
        tl.minimum(left + 1, n - 1),
        (twice % (2 * length)).to(tl.float32) / (2 * length).to(tl.float32),
    )


@triton.jit
def _contribution(
    codes, table, bias, t, n, length, D: tl.constexpr, TAPS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """phi(up(E[codes])) at the frames ``t``; frames outside the sequence and code -1 are zero rows."""
    d = tl.arange(0, BLOCK_D)
    channels = (d < D)[None, :]
    h = tl.zeros([t.shape[0], BLOCK_D], tl.float32)
    if bias is not None:
        h += tl.load(bias + d, mask=d < D, other=0.0)[None, :]
    for tap in tl.static_range(TAPS):
        position = t + (tap - TAPS // 2)
        inside = (position >= 0) & (position < length)
        left, right, weight = _left_and_right(position, n, length)
        code = tl.load(codes + left, mask=inside, other=-1).to(tl.int32)
        rows = table + (code * TAPS + tap)[:, None] * D + d[None, :]
        h += (1 - weight)[:, None] * tl.load(rows, mask=(code >= 0)[:, None] & channels, other=0.0)
        code = tl.load(codes + right, mask=inside & (weight > 0), other=-1).to(tl.int32)
        rows = table + (code * TAPS + tap)[:, None] * D + d[None, :]
        h += weight[:, None] * tl.load(rows, mask=(code >= 0)[:, None] & channels, other=0.0)
    return h


@triton.jit
def _check(codes, count, size, BLOCK: tl.constexpr):
    """Asserts that each of ``codes[count]`` is one, or -1."""
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        code = tl.load(codes + i, mask=i < count, other=-1)
        tl.device_assert((code >= -1) & (code < size), "codes must be in [-1, codebook_size)")


@triton.jit(do_not_specialize=["length", "size", "tokens", "kept", "first", "last"])
def residual_kernel(
    x, mask, residual, rows, codes, book, norms, table, bias, layout, quantized, residual_sum, residuals,
    loss, length, size, tokens, kept, first, last,
    D: tl.constexpr, TAPS: tl.constexpr, COSINE: tl.constexpr, PER_SCALE: tl.constexpr,
    KEEP_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Scales ``first <= s < last`` of the item ``program_id(0)``, which no other program touches.

    The residual stays in global memory: one item's fits the L1 cache, and rows of it are needed by other
    threads than those that wrote them, whence the barriers. ``quantized`` and what follows it are None in
    inference. ``rows[B, kept, D]`` is scratch, or the downsampled rows of every token (KEEP_ROWS)."""
    item = tl.program_id(0).to(tl.int64)
    x += item * length * D
    residual += item * length * D
    rows += item * kept * D
    codes += item * tokens
    if mask is not None:
        mask += item * length
    d = tl.arange(0, BLOCK_D)
    channels = (d < D)[None, :]

    broken = tl.zeros([BLOCK_T, BLOCK_D], tl.int32)
    for start in range(0, length, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        frames = t < length
        seen = frames
        if mask is not None:
            seen = seen & tl.load(mask + t, mask=frames, other=False)
        value = tl.load(x + t[:, None] * D + d[None, :], mask=seen[:, None] & channels, other=0.0)
        broken = tl.where(tl.abs(value) < float("inf"), broken, 1)
        tl.store(residual + t[:, None] * D + d[None, :], value, mask=frames[:, None] & channels)
    sound = tl.max(tl.max(broken, 1), 0) == 0

    squares = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for s in range(first, last):
        fields = layout + s * FIELDS
        n = tl.load(fields + LENGTH)
        scale_codes = codes + tl.load(fields + OFFSET)
        scale_rows = rows
        if KEEP_ROWS:
            scale_rows += tl.load(fields + OFFSET).to(tl.int64) * D
        e = tl.load(fields + BOOK).to(tl.int64)
        scale_table = table + tl.load(fields + PAIR).to(tl.int64) * size * TAPS * D
        scale_bias = bias
        if bias is not None:
            scale_bias += tl.load(fields + PHI) * D

        for start in range(0, n, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            tl.debug_barrier()
            pooled, count = _pool(residual, mask, i, n, length, D, BLOCK_D)
            pooled = tl.where(sound, pooled, 0.0)
            tl.store(scale_rows + i[:, None] * D + d[None, :], pooled, mask=(i < n)[:, None] & channels)
            tl.debug_barrier()
            nearest, _ = _search(
                scale_rows,
                book + e * size * D,
                norms + e * size,
                i,
                n,
                size,
                D,
                COSINE,
                BLOCK_N,
                BLOCK_K,
                BLOCK_D,
            )
            nearest = tl.where((count > 0) & sound, nearest, -1)
            tl.store(scale_codes + i, nearest.to(tl.int64), mask=i < n)
        tl.debug_barrier()

        for start in range(0, length, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            frames = (t < length)[:, None] & channels
            h = _contribution(scale_codes, scale_table, scale_bias, t, n, length, D, TAPS, BLOCK_D)
            if mask is not None:
                h = tl.where(tl.load(mask + t, mask=t < length, other=False)[:, None], h, 0.0)
            at = t[:, None] * D + d[None, :]
            before = tl.load(residual + at, mask=frames, other=0.0)
            after = before - h
            tl.store(residual + at, after, mask=frames)
            if quantized is not None:
                # `before - before` is 0, or NaN in a broken item, as the straight-through estimator makes it.
                estimate = before + (h - before) if PER_SCALE else h + (before - before)
                at += item * length * D
                tl.store(
                    quantized + at, tl.load(quantized + at, mask=frames, other=0.0) + estimate, mask=frames
                )
                tl.store(
                    residual_sum + at, tl.load(residual_sum + at, mask=frames, other=0.0) + after, mask=frames
                )
                squares += tl.where(frames, after * after, 0.0)
                if residuals is not None:
                    tl.store(
                        residuals + s * tl.num_programs(0).to(tl.int64) * length * D + at, after, mask=frames
                    )
    if quantized is not None:
        tl.store(loss + item, tl.load(loss + item) + tl.sum(tl.sum(squares, 1), 0))


@triton.jit(do_not_specialize=["length", "size", "stride", "skip", "first", "last"])
def decode_kernel(
    out, base, codes, table, bias, layout, length, size, stride, skip, first, last,
    D: tl.constexpr, TAPS: tl.constexpr, KEEP_SCALES: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``base`` plus the contributions of scales ``first <= s < last``: the last sum, or (KEEP_SCALES) each of
    them.

    ``codes[B, stride]`` begin with token ``skip`` of the schedule. Program (item, block of frames).
    """
    item = tl.program_id(0).to(tl.int64)
    items = tl.num_programs(0).to(tl.int64)
    _check(codes + item * stride, stride, size, 256)
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    frames = (t < length)[:, None] & (d < D)[None, :]
    at = item * length * D + t[:, None] * D + d[None, :]
    h = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if base is not None:
        h = tl.load(base + at, mask=frames, other=0.0)
    for s in range(first, last):
        fields = layout + s * FIELDS
        n = tl.load(fields + LENGTH)
        scale_codes = codes + item * stride + (tl.load(fields + OFFSET) - skip)
        scale_table = table + tl.load(fields + PAIR).to(tl.int64) * size * TAPS * D
        scale_bias = bias
        if bias is not None:
            scale_bias += tl.load(fields + PHI) * D
        h += _contribution(scale_codes, scale_table, scale_bias, t, n, length, D, TAPS, BLOCK_D)
        if KEEP_SCALES:
            tl.store(out + s * items * length * D + at, h, mask=frames)
    if not KEEP_SCALES:
        tl.store(out + at, h, mask=frames)


@triton.jit(do_not_specialize=["length", "size", "scale", "following"])
def step_kernel(
    out, pooled, base, codes, table, bias, layout, length, size, scale, following,
    D: tl.constexpr, TAPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A step of sampling: ``base[B, T, D]`` plus the contribution of one scale, and that sum pooled to the
    ``following`` tokens of the next scale, or not (None). Program (item, block of those tokens).

    A program computes the frames that its tokens see. Two whose windows share a frame write the same number to it."""
    item = tl.program_id(0).to(tl.int64)
    fields = layout + scale * FIELDS
    n = tl.load(fields + LENGTH)
    codes += item * n
    table += tl.load(fields + PAIR).to(tl.int64) * size * TAPS * D
    if bias is not None:
        bias += tl.load(fields + PHI) * D
    out += item * length * D
    base += item * length * D
    _check(codes, n, size, 256)

    d = tl.arange(0, BLOCK_D)
    channels = (d < D)[None, :]
    stop = (tl.minimum((tl.program_id(1) + 1) * BLOCK_I, following) * length + following - 1) // following
    for start in range(tl.program_id(1) * BLOCK_I * length // following, stop, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        frames = (t < stop)[:, None] & channels
        at = t[:, None] * D + d[None, :]
        h = tl.load(base + at, mask=frames, other=0.0)
        h += _contribution(codes, table, bias, t, n, length, D, TAPS, BLOCK_D)
        tl.store(out + at, h, mask=frames)
    if pooled is not None:
        tl.debug_barrier()
        i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
        mean, _ = _pool(out, None, i, following, length, D, BLOCK_D)
        row = item * following + i
        tl.store(pooled + row[:, None] * D + d[None, :], mean, mask=(i < following)[:, None] & channels)


@triton.jit(do_not_specialize=["length", "stride", "skip", "first"])
def pool_kernel(
    out, sequences, layout, length, stride, skip, first,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``sequences[scales, B, T, D]`` pooled to the lengths of scales ``first, first + 1, ...``: ``out[B,
    stride, D]``, which begins with token ``skip`` of the schedule. Program (item, scale, block of tokens)."""
    item = tl.program_id(0).to(tl.int64)
    fields = layout + (first + tl.program_id(1)) * FIELDS
    n = tl.load(fields + LENGTH)
    i = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    sequence = sequences + (tl.program_id(1) * tl.num_programs(0).to(tl.int64) + item) * length * D
    pooled, _ = _pool(sequence, None, i, n, length, D, BLOCK_D)
    row = item * stride + (tl.load(fields + OFFSET) - skip) + i
    tl.store(out + row[:, None] * D + d[None, :], pooled, mask=(i < n)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["size"])
def table_kernel(
    out, codebooks, kernels, pairs, size, D: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[P, size, TAPS, D]``: each code of a codebook times each tap of a phi kernel, for the pairs of
    both.

    ``kernels[P', TAPS, D, D]`` are those of `common.fold`, as (in, out) matrices. A kernel of ours, because a
    library product would follow the user's TF32 and autocast settings. Program (pair * tap, block of codes,
    block of channels)."""
    pair = tl.program_id(0) // TAPS
    tap = tl.program_id(0) % TAPS
    book = codebooks + tl.load(pairs + 2 * pair).to(tl.int64) * size * D
    kernel = kernels + (tl.load(pairs + 2 * pair + 1) * TAPS + tap) * D * D
    code = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        i = k + tl.arange(0, BLOCK_K)
        a = tl.load(
            book + code[:, None] * D + i[None, :], mask=(code < size)[:, None] & (i < D)[None, :], other=0.0
        )
        b = tl.load(kernel + i[:, None] * D + o[None, :], mask=(i < D)[:, None] & (o < D)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    row = (pair.to(tl.int64) * size + code) * TAPS + tap
    tl.store(out + row[:, None] * D + o[None, :], acc, mask=(code < size)[:, None] & (o < D)[None, :])


@triton.jit(do_not_specialize=["batch", "length", "size", "tokens"])
def phi_grad_kernel(
    out, residuals, codes, codebooks, layout, batch, length, size, tokens,
    D: tl.constexpr, TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[S, D, D, TAPS]``: the sum over items and frames of (residual after the scale) x (upsampled codes
    at a tap).

    Program (scale * tap, block of output channels, block of input channels). Taps beyond the width of the
    scale's phi kernel are zero."""
    s = tl.program_id(0) // TAPS
    tap = tl.program_id(0) % TAPS
    fields = layout + s * FIELDS
    n = tl.load(fields + LENGTH)
    shift = tap - TAPS // 2
    book = codebooks + tl.load(fields + BOOK).to(tl.int64) * size * D
    o = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    items = tl.where(tl.abs(shift) <= tl.load(fields + WIDTH) // 2, batch, 0)
    scale_codes = codes + tl.load(fields + OFFSET)
    after = residuals + s.to(tl.int64) * batch * length * D
    for _ in range(items):
        for start in range(0, length, BLOCK_K):
            t = start + tl.arange(0, BLOCK_K)
            g = tl.load(
                after + t[None, :] * D + o[:, None], mask=(t < length)[None, :] & (o < D)[:, None], other=0.0
            )
            position = t + shift
            inside = (position >= 0) & (position < length)
            left, right, weight = _left_and_right(position, n, length)
            code = tl.load(scale_codes + left, mask=inside, other=-1).to(tl.int32)
            rows = book + code[:, None] * D + i[None, :]
            u = (1 - weight)[:, None] * tl.load(rows, mask=(code >= 0)[:, None] & (i < D)[None, :], other=0.0)
            code = tl.load(scale_codes + right, mask=inside & (weight > 0), other=-1).to(tl.int32)
            rows = book + code[:, None] * D + i[None, :]
            u += weight[:, None] * tl.load(rows, mask=(code >= 0)[:, None] & (i < D)[None, :], other=0.0)
            acc = tl.dot(g, u, acc, input_precision="ieee")
        scale_codes += tokens
        after += length * D
    at = ((s.to(tl.int64) * D + o)[:, None] * D + i[None, :]) * TAPS + tap
    tl.store(out + at, acc, mask=(o < D)[:, None] & (i < D)[None, :])
