"""The Triton kernel of linear layers with packed weights: numbers of weights are widened in registers, for `tl.dot`.

The product is computed transposed, ``W x^T``: weights are its left operand, which tensor cores take from registers, and
the rows of x, of which there are few, are padded to 16 only. Where they are so few that programs for all channels would
not fill a GPU, the warps of a program divide K among them, so that there is one launch and a fixed order of sums. Each
has one part, as Triton 3.6 gives warps that are left over the same product again.
"""

from __future__ import annotations

import triton
import triton.language as tl

FEW_ROWS, MANY_ROWS = 32, 512


def options(rows: int, dtype: tl.dtype) -> dict[str, int]:
    """Constants and launch options for so many rows of x and products in ``dtype``."""
    if dtype == tl.float32:  # without tensor cores
        m, n, k, parts, warps, stages = (16, 16, 32, 4, 4, 2) if rows <= FEW_ROWS else (64, 64, 32, 1, 4, 2)
    elif rows <= FEW_ROWS:
        m, n, k, parts, warps, stages = (16 if rows <= 16 else 32), 16, 64, 4, 4, 4
    elif rows <= MANY_ROWS:
        m, n, k, parts, warps, stages = 64, 32, 32, 4, 4, 4
    else:
        m, n, k, parts, warps, stages = 128, 128, 64, 1, 8, 3
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PARTS": parts, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@triton.jit
def _widened(w, DTYPE: tl.constexpr):
    """Exactly. uint8 are the bits of e4m3: moved into those of fp16 they are the number / 256, denormals too."""
    if w.dtype == tl.uint8:
        # The sign was extended into the highest bit of the exponent, which no e4m3 has set.
        half = (w.to(tl.int8, bitcast=True).to(tl.int16) << 7) & ~0x4000
        w = half.to(tl.float16, bitcast=True)
    return w.to(DTYPE)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, data, scale, bias, out, M, N: tl.constexpr, K: tl.constexpr, GELU: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of ``out[M, N]``, from ``x[M, K]`` and ``data[N, K]``, products in ``DTYPE`` and sums in fp32.

    ``scale[N]`` and ``bias[N]`` may be None. Program (block of channels, block of rows)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    w_tile = data + n.to(tl.int64)[None, :, None] * K + k[:, None, :]
    x_tile = x + m.to(tl.int64)[None, None, :] * K + k[:, :, None]
    # One part is a plain matrix product, which all warps share.
    ONE: tl.constexpr = PARTS == 1
    sums = tl.zeros([BLOCK_N, BLOCK_M] if ONE else [PARTS, BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, K, PARTS * BLOCK_K):
        inside = start + k < K
        w = tl.load(w_tile + start, mask=inside[:, None, :] & (n < N)[None, :, None], other=0)
        rows = tl.load(x_tile + start, mask=inside[:, :, None] & (m < M)[None, None, :], other=0)
        if ONE:
            w, rows = tl.reshape(w, [BLOCK_N, BLOCK_K]), tl.reshape(rows, [BLOCK_K, BLOCK_M])
        sums = tl.dot(_widened(w, DTYPE), rows.to(DTYPE), sums, input_precision="ieee")
    y = tl.trans(sums if ONE else tl.sum(sums, 0))
    if scale is not None:
        unit = tl.load(scale + n, mask=n < N, other=0)
        y *= (unit * 256 if data.dtype.element_ty == tl.uint8 else unit)[None, :]
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    if GELU:  # y / 2 * (1 + tanh(u)) is y / (1 + exp(-2 u))
        y = y / (1 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
