"""The kernels of factorised quantizers and their pinned block sizes; `triton_projected` launches them.

Sequences are contiguous ``[B, channels, T]`` fp32, frames side by side; ``layout[levels, 2]`` holds the stride of each
level and the offset of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl

from .triton_kernels import _search

PROJECT = {"BLOCK_N": 16, "BLOCK_T": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


def search_blocks(dim: int) -> dict[str, int]:
    """Tokens x codes x channels of the search. Levels have few channels, 8 as a rule. Left alone, ptxas takes fewer
    registers, and spills some."""
    width = triton.next_power_of_2(dim)
    return {
        "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": min(max(width, 16), 32), "BLOCK_D": width, "num_warps": 4,
        "num_stages": 3, "maxnreg": 168,
    }  # fmt: skip


def decode_blocks(dim: int) -> dict[str, int]:
    width = min(max(triton.next_power_of_2(dim), 16), 32)
    return {"BLOCK_N": 64, "BLOCK_T": 32, "BLOCK_K": width, "num_warps": 4, "num_stages": 3}


def tile(strides: Sequence[int]) -> int:
    """Frames of one program: whole tokens of every level, and few, so that a short sequence has many programs."""
    period = math.lcm(*strides)
    return period * max(16 // period, 1)


@triton.jit(do_not_specialize=["length", "rows"])
def project_kernel(
    out, x, weight, bias, channels, length, rows,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[B, rows, T] = weight[rows, channels] @ x[B, channels, T] + bias``: what every level would project the input
    to. A kernel of ours, because a library product would follow the user's TF32 and autocast settings. Program (item,
    block of frames, block of rows)."""
    item = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += item * channels * length
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for k in range(0, channels, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        inside = c < channels
        w = tl.load(weight + n[:, None] * channels + c[None, :], mask=(n < rows)[:, None] & inside[None, :], other=0.0)
        at = x + c[:, None].to(tl.int64) * length + t[None, :]
        v = tl.load(at, mask=inside[:, None] & (t < length)[None, :], other=0.0)
        acc = tl.dot(w, v, acc, input_precision="ieee")
    acc += tl.load(bias + n, mask=n < rows, other=0.0)[:, None]
    at = (item * rows + n)[:, None] * length + t[None, :]
    tl.store(out + at, acc, mask=(n < rows)[:, None] & (t < length)[None, :])


@triton.jit(do_not_specialize=["length", "size", "tokens", "levels", "width", "tile"])
def levels_kernel(
    projected, rows, codes, sound, book, norms, table, layout, length, size, tokens, levels, width, tile,
    D: tl.constexpr, COSINE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All levels of a tile of frames, which no other program touches. Program (item, tile).

    ``projected[B, levels * D, T]``, what every level would project the input to, becomes what it does project: level
    ``s`` sees ``table[j, code, s * D :]`` less (`common.later_rows`, ``[levels, size, width]``) for the code of each
    level ``j`` before it. ``rows[B, T, D]`` is scratch. Codes are -1 where the item is not ``sound[B]``.

    Codes and rows are read by other threads than those that wrote them, whence the barriers."""
    item = tl.program_id(0).to(tl.int64)
    projected += item * levels * D * length
    rows += item * length * D
    codes += item * tokens
    good = tl.load(sound + item)
    first = tl.program_id(1) * tile
    last = tl.minimum(first + tile, length)
    d = tl.arange(0, BLOCK_D)
    channels = (d < D)[None, :]
    for s in range(levels):
        stride = tl.load(layout + 2 * s)
        end = last // stride
        level_codes = codes + tl.load(layout + 2 * s + 1)
        level_rows = rows + (first - first // stride) * D  # so that no two tiles share any
        for start in range(first // stride, end, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            seen = (i < end)[:, None] & channels
            total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for r in range(stride):
                t = i * stride + r
                at = projected + (s * D + d)[None, :].to(tl.int64) * length + t[:, None]
                z = tl.load(at, mask=seen, other=0.0)
                for j in range(s):
                    token = tl.load(layout + 2 * j + 1) + t // tl.load(layout + 2 * j)
                    code = tl.load(codes + token, mask=i < end, other=-1)
                    earlier = table + (j * size + code)[:, None] * width + (s * D + d)[None, :]
                    z -= tl.load(earlier, mask=(code >= 0)[:, None] & channels, other=0.0)
                tl.store(at, z, mask=seen)
                total += z
            mean = tl.where(good, total / stride.to(tl.float32), 0.0)
            tl.store(level_rows + i[:, None] * D + d[None, :], mean, mask=seen)
            tl.debug_barrier()
            nearest, _ = _search(level_rows, book, norms, i, end, size, D, COSINE, BLOCK_N, BLOCK_K, BLOCK_D)
            tl.store(level_codes + i, tl.where(good, nearest, -1).to(tl.int64), mask=i < end)
            tl.debug_barrier()
        book += size * D
        norms += size


@triton.jit(do_not_specialize=["length", "size", "tokens", "levels"])
def decode_kernel(
    out, codes, book, weight, bias, layout, channels, length, size, tokens, levels,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[B, channels, T]``: the sum over levels of ``weight[s] @ book[s, code]``, and ``bias[channels]``. Code -1 is
    a zero row. Program (item, block of frames, block of channels)."""
    item = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes += item * tokens
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for s in range(levels):
        token = tl.load(layout + 2 * s + 1) + t // tl.load(layout + 2 * s)
        code = tl.load(codes + token, mask=t < length, other=-1)
        tl.device_assert((code >= -1) & (code < size), "codes must be in [-1, codebook_size)")
        rows = book + (s * size + code) * D
        for k in range(0, D, BLOCK_K):
            d = k + tl.arange(0, BLOCK_K)
            at = weight + (s * channels + n)[:, None] * D + d[None, :]
            w = tl.load(at, mask=(n < channels)[:, None] & (d < D)[None, :], other=0.0)
            e = tl.load(rows[None, :] + d[:, None], mask=(code >= 0)[None, :] & (d < D)[:, None], other=0.0)
            acc = tl.dot(w, e, acc, input_precision="ieee")
    acc += tl.load(bias + n, mask=n < channels, other=0.0)[:, None]
    at = (item * channels + n)[:, None] * length + t[None, :]
    tl.store(out + at, acc, mask=(n < channels)[:, None] & (t < length)[None, :])
