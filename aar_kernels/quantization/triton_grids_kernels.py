"""The kernels of quantizers of grids and their pinned block sizes; `triton_grids` launches them.

Images are contiguous ``[B, T, D]`` fp32, T the cells of a grid of ``height`` by ``width``, line by line; a scale is a
grid of ``tall`` by ``wide`` tokens. The rows of all items are one list, so that a block is full where a scale has few.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _check, _search

# One for all: which rounding decides a near tie must not depend on the batch, as another tile might make it.
SEARCH = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
PHI = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
PROGRAMS = 256  # of a search, where there are enough codes: about two for each multiprocessor


def cell_blocks(dim: int) -> dict[str, int]:
    """Blocks of cells, for kernels without a dot product."""
    width = triton.next_power_of_2(dim)
    return {"BLOCK_D": width, "BLOCK_M": max(1024 // width, 1), "num_warps": 4}


@triton.jit(do_not_specialize=["height", "width", "tall", "wide", "stride", "offset"])
def pool_kernel(
    out, images, height, width, tall, wide, stride, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Means of ``images[B, T, D]`` over the windows of a scale's tokens: ``out[B, stride, D]`` from ``offset`` on.
    Program (item and token): the one token of the first scale sees all cells, so they are what is taken in blocks."""
    item = (tl.program_id(0) // (tall * wide)).to(tl.int64)
    token = tl.program_id(0) % (tall * wide)
    i, j = token // wide, token % wide
    top, left = i * height // tall, j * width // wide
    across = ((j + 1) * width + wide - 1) // wide - left
    cells = (((i + 1) * height + tall - 1) // tall - top) * across
    images += item * height * width * D
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, cells, BLOCK_M):
        c = start + tl.arange(0, BLOCK_M)
        cell = (top + c // across) * width + left + c % across
        total += tl.load(
            images + cell[:, None] * D + d[None, :], mask=(c < cells)[:, None] & (d < D)[None, :], other=0.0
        )
    row = item * stride + offset + token
    tl.store(out + row * D + d, tl.sum(total, 0) / cells.to(tl.float32), mask=d < D)


@triton.jit(do_not_specialize=["count", "n", "size", "part", "stride", "offset"])
def search_kernel(
    keys, rows, sound, book, norms, count, n, size, part, stride, offset, D: tl.constexpr, COSINE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The nearest of ``book[size, D]`` to each of ``rows[count, D]``, ``n`` of them an item, into ``keys[B, stride]``
    from ``offset`` on. Program (block of rows, ``part`` codes).

    A key is the distance above the code, in integers that are ordered as both are; so the parts meet in a minimum, in
    any order, and the first of equally near codes wins. Where an item is not ``sound[B]`` the code is -1.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    here = tl.minimum(count - start, BLOCK_M).to(tl.int32)
    first = tl.program_id(1) * part
    nearest, distance = _search(
        rows + start * D, book + first * D, norms + first, i, here, tl.minimum(size - first, part),
        D, COSINE, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    bits = distance.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # among negative numbers more bits are less
    key = (order.to(tl.int64) << 32) | (first + nearest)
    item, token = (start + i) // n, (start + i) % n
    key = tl.where(tl.load(sound + item, mask=i < here, other=True), key, -1)
    tl.atomic_min(keys + item * stride + offset + token, key, mask=i < here, sem="relaxed")


@triton.jit
def _cubic(position, n, length):
    """Cubic interpolation of ``n`` tokens at a cell: the first of its four, and their weights (Keys, a = -0.75 as in
    PyTorch). In integers up to the last division, so that a cell upon a token has no weight for others."""
    twice = (2 * position + 1) * n + length
    x = (twice % (2 * length)).to(tl.float32) / (2 * length).to(tl.float32)  # beyond the second token
    y = 1.0 - x
    near, far = 1.0 - (2.25 - 1.25 * x) * x * x, 1.0 - (2.25 - 1.25 * y) * y * y
    return twice // (2 * length) - 2, (-0.75 * x * y * y, near, far, -0.75 * y * x * x)


@triton.jit(do_not_specialize=["count", "height", "width", "tall", "wide", "stride", "offset", "checked", "size"])
def up_kernel(
    out, base, codes, rows, count, height, width, tall, wide, stride, offset, checked, size,
    D: tl.constexpr, SIGN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``out[B, T, D]``: ``base`` plus SIGN times the bicubic interpolation of a scale's tokens, or (None) that alone;
    ``count`` is B * T.

    The tokens are those of ``codes[B, stride]`` from ``offset`` on, or of the keys of `search_kernel`, among
    ``rows[size, D]``; or (None) of ``rows[B, stride, D]`` themselves. The first ``checked`` of all codes must be codes,
    or -1: each program checks its share. Program (block of cells)."""
    if codes is not None:
        share = tl.cdiv(checked, tl.num_programs(0))
        begin = tl.program_id(0) * share
        _check(codes + begin, tl.minimum(checked - begin, share), size, 256)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    t = start + tl.arange(0, BLOCK_M)
    first = t // (height * width) * stride + offset  # of the item's tokens
    cell = (t % (height * width)).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    inside, channels = t < count, (d < D)[None, :]
    top, down = _cubic(cell // width, tall, height)
    left, across = _cubic(cell % width, wide, width)
    h = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.static_range(4):
        for j in tl.static_range(4):
            weight = down[i] * across[j]
            # Beyond the ends the outermost token stands for the others.
            line, column = tl.maximum(top + i, 0), tl.maximum(left + j, 0)
            row = first + tl.minimum(line, tall - 1) * wide + tl.minimum(column, wide - 1)
            used = inside & (weight != 0)
            if codes is not None:
                row = tl.load(codes + row, mask=used, other=-1).to(tl.int32)  # of a key, what is below the distance
                used = used & (row >= 0)
            value = tl.load(rows + row[:, None] * D + d[None, :], mask=used[:, None] & channels, other=0.0)
            h += weight[:, None] * value
    at = t[:, None] * D + d[None, :]
    if base is not None:
        h = tl.load(base + at, mask=inside[:, None] & channels, other=0.0) + SIGN * h
    tl.store(out + at, h, mask=inside[:, None] & channels)


@triton.jit(do_not_specialize=["count", "height", "width"])
def phi_kernel(
    out, base, images, weight, bias, count, height, width, D: tl.constexpr, SIDE: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[B, T, D]``: ``base`` plus SIGN times phi of ``images[B, T, D]``, or (None) that alone; ``count`` is B * T.

    ``weight[SIDE * SIDE, D, D]`` is `common.fold`'s, as (in, out) matrices. A kernel of ours, because a library's would
    follow the user's TF32 and autocast settings. Program (block of cells, block of channels)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    cell = ((start + i) % (height * width)).to(tl.int32)
    y, x = cell // width, cell % width
    known = start + i < count
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    images += start * D
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slices: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    for step in range(SIDE * SIDE * slices):  # one loop, so that loads run ahead from tap to tap
        tap = step // slices
        dy, dx = tap // SIDE - SIDE // 2, tap % SIDE - SIDE // 2
        k = step % slices * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = known & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        cells = images + (i + dy * width + dx)[:, None] * D + k[None, :]
        a = tl.load(cells, mask=seen[:, None] & (k < D)[None, :], other=0.0)
        inputs = weight + (tap * D + k)[:, None] * D + o[None, :]
        b = tl.load(inputs, mask=(k < D)[:, None] & (o < D)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    acc += tl.load(bias + o, mask=o < D, other=0.0)[None, :]
    at, inside = (start + i)[:, None] * D + o[None, :], known[:, None] & (o < D)[None, :]
    if base is not None:
        acc = tl.load(base + at, mask=inside, other=0.0) + SIGN * acc
    tl.store(out + at, acc, mask=inside)
