"""Triton kernels of SEANet's layers, each a matrix product whose rows are gathered from the signal.

A row is a step of an item, all items' one after the other, so that a batch of short signals fills the tiles as a long
one does. It holds what the layer's taps read at that step: padding is arithmetic on the index, and ELU is computed as
numbers are loaded, so that neither is ever in memory. Signals are contiguous ``[B, T, C]``, weights as `layers.pack`
lays them out: ``[ceil(N / 16), K + 1, 16]``, row K the bias.

Products of fp32 are exact fp32 ("ieee"): one TF32 product moves latents far enough to change codes, and three of them
sum in accumulators that round towards zero, whose error grows with K, up to 7168 here.

How a row is cut into sums depends on the layer alone, so that neither the batch nor a chunk of a stream changes it.
"""

from __future__ import annotations

import triton
import triton.language as tl

PANEL = tl.constexpr(16)
FUSED_CHANNELS = 128  # outputs of a residual block that one program sums; wider ones have few rows to share out


def conv_block(taps: int, channels: int, columns: int) -> dict[str, int]:
    """Layers of many channels run at low rates, on few rows: small tiles then, for every multiprocessor to have one."""
    rows = 32 if channels >= 256 else 64
    block = {"BLOCK_M": rows, "BLOCK_N": min(max(triton.next_power_of_2(columns), 16), rows)}
    return block | {"BLOCK_K": 16 if taps * channels <= 16 else 32, "num_warps": 8 if block["BLOCK_N"] == 64 else 4}


def residual_block(hidden: int, outputs: int) -> dict[str, int]:
    """The sums of all outputs are held, and the hidden channels a few at a time."""
    columns = max(triton.next_power_of_2(outputs), 16)
    block = {"BLOCK_M": 32 if columns <= 64 else 16, "BLOCK_N": columns, "BLOCK_K": 32}
    return block | {"BLOCK_H": 16 if hidden <= 16 else 32, "num_warps": 4}


@triton.jit
def _elu(x):
    # exp(x) - 1 of a small number has lost digits, which its series has: nine terms are enough up to 1/2.
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8 * (1 + x / 9)))))))
    return tl.where(x > 0, x, tl.where(x > -0.5, x * series, tl.exp(x) - 1))


@triton.jit
def _columns(n, N: tl.constexpr, K: tl.constexpr):
    """Where the weights of columns begin, of ``[ceil(N / 16), K + 1, 16]``, and which of them there are."""
    return (n // PANEL) * ((K + 1) * PANEL) + n % PANEL, n < N


@triton.jit
def _accumulate(
    acc, x, item, first, inside, length, edge, weights, columns, exists, ROW: tl.constexpr, TAPS: tl.constexpr,
    C: tl.constexpr, DILATION: tl.constexpr, REFLECT: tl.constexpr, ELU: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the product of what the taps from step ``first`` on read with weights from row ``ROW`` on."""
    K: tl.constexpr = TAPS * C
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if C % BLOCK_K == 0:  # all of one tap
            step = first[:, None] + start // C * DILATION
            channel = start % C + tl.arange(0, BLOCK_K)
        else:
            step = first[:, None] + (k // C * DILATION)[None, :]
            channel = k % C
        if REFLECT:
            step = edge - tl.abs(edge - tl.abs(step))
        within = inside[:, None] & (step >= 0) & (step < length) & (k < K)[None, :]
        value = tl.load(x + (item[:, None] + step) * C + channel[None, :], mask=within, other=0.0)
        if ELU:
            value = _elu(value.to(tl.float32)).to(x.dtype.element_ty)
        at = columns[None, :] + (ROW + k)[:, None] * PANEL
        weight = tl.load(weights + at, mask=(k < K)[:, None] & exists[None, :], other=0.0).to(x.dtype.element_ty)
        acc = tl.dot(value, weight, acc, input_precision="ieee")
    return acc


@triton.jit
def _around(
    acc, around, item, step, inside, length, weights, columns, exists, n, N: tl.constexpr, ROW: tl.constexpr,
    SHORTCUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the input of a residual block, through its shortcut of that many channels, or as it is if 0."""
    if SHORTCUT > 0:
        acc = _accumulate(
            acc, around, item, step, inside, length, 0, weights, columns, exists, ROW=ROW, TAPS=1, C=SHORTCUT,
            DILATION=1, REFLECT=False, ELU=False, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    else:
        at = (item + step)[:, None] * N + n[None, :]
        acc += tl.load(around + at, mask=inside[:, None] & exists[None, :], other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["rows", "steps", "length", "edge", "left", "skip", "size", "around_length"])
def conv_kernel(
    x, weights, around, out, rows, steps, length, edge, left, skip, size, around_length, C: tl.constexpr,
    N: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, REFLECT: tl.constexpr,
    ELU: tl.constexpr, SHORTCUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows ``program_id(0)`` and columns ``program_id(1)`` of a convolution; ``around`` is that of `_around`.

    An item has ``steps`` rows and ``size`` numbers of output, the first of which is its number ``skip``: a transposed
    convolution's row gives ``stride`` steps of output side by side, and those that are trimmed are not stored.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    item, step = row // steps, row % steps
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    K: tl.constexpr = TAPS * C + SHORTCUT
    columns, exists = _columns(n, N, K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _accumulate(
        acc, x, item * length, step * STRIDE - left, inside, length, edge, weights, columns, exists, ROW=0, TAPS=TAPS,
        C=C, DILATION=DILATION, REFLECT=REFLECT, ELU=ELU, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    acc += tl.load(weights + columns + K * PANEL, mask=exists, other=0.0).to(tl.float32)[None, :]
    if around is not None:
        acc = _around(
            acc, around, item * around_length, step + (around_length - steps), inside, around_length, weights, columns,
            exists, n, N=N, ROW=TAPS * C, SHORTCUT=SHORTCUT, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    at = (step * N - skip)[:, None] + n[None, :]
    kept = inside[:, None] & exists[None, :] & (at >= 0) & (at < size)
    tl.store(out + (item * size)[:, None] + at, acc.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows", "steps", "length", "edge", "left"])
def residual_kernel(
    x, first, second, out, rows, steps, length, edge, left, C: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    TAPS: tl.constexpr, DILATION: tl.constexpr, REFLECT: tl.constexpr, SHORTCUT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rows ``program_id(0)`` of a residual block: its hidden channels are never in memory."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    item, step = row // steps, row % steps
    n = tl.arange(0, BLOCK_N)
    K: tl.constexpr = H + SHORTCUT
    columns, exists = _columns(n, N, K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        of_hidden, hidden_exists = _columns(h, H, TAPS * C)
        hidden = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        hidden = _accumulate(
            hidden, x, item * length, step - left, inside, length, edge, first, of_hidden, hidden_exists, ROW=0,
            TAPS=TAPS, C=C, DILATION=DILATION, REFLECT=REFLECT, ELU=True, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        hidden += tl.load(first + of_hidden + TAPS * C * PANEL, mask=hidden_exists, other=0.0).to(tl.float32)[None, :]
        at = columns[None, :] + h[:, None] * PANEL
        weight = tl.load(second + at, mask=hidden_exists[:, None] & exists[None, :], other=0.0)
        dtype = x.dtype.element_ty
        acc = tl.dot(_elu(hidden).to(dtype), weight.to(dtype), acc, input_precision="ieee")
    acc += tl.load(second + columns + K * PANEL, mask=exists, other=0.0).to(tl.float32)[None, :]
    acc = _around(
        acc, x, item * length, step + (length - steps), inside, length, second, columns, exists, n, N=N, ROW=H,
        SHORTCUT=SHORTCUT, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    at = row[:, None] * N + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside[:, None] & exists[None, :])


SNAKE = {"BLOCK": 1024, "num_warps": 4}


@triton.jit(do_not_specialize=["size"])
def snake_kernel(x, alpha, out, size, C: tl.constexpr, BLOCK: tl.constexpr):
    """``out = x + sin(alpha x)^2 / (alpha + 1e-9)`` of ``x[size / C, C]``, program (block of numbers).

    A pass of its own: as numbers are loaded for a product it would be computed for each tap and tile of columns anew.
    The sine is squared, so its argument is reduced by multiples of pi (in three parts, without loss) to a polynomial's
    range; from 2^23 on what is added is less than the last place of x.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(alpha + at % C).to(tl.float32)
    t = a * value
    n = tl.floor(t * 0.318309886 + 0.5)
    r = t - n * 3.140625 - n * 9.67502593994140625e-4 - n * 1.50995798e-7
    z = r * r
    sine = r + r * z * (-1.6666660e-1 + z * (8.3330655e-3 + z * (-1.9809577e-4 + z * 2.6057207e-6)))
    term = tl.where(tl.abs(t) < 8388608.0, sine * sine, t * 0.0)
    tl.store(out + at, (value + term / (a + 1e-9)).to(out.dtype.element_ty), mask=inside)


NORM = {"BLOCK": 2048, "num_warps": 8}
PARTS = 256  # at most, in which the numbers of an item are summed


@triton.jit(do_not_specialize=["size", "chunk"])
def moments_kernel(x, moments, size, chunk, BLOCK: tl.constexpr):
    """Mean, and sum of squared deviations from it, of ``chunk`` numbers of an item of ``x[B, size]``:
    ``moments[B, parts, 2]``. Program (part, item)."""
    begin = tl.program_id(0).to(tl.int64) * chunk
    count = tl.minimum(size - begin, chunk)
    x += tl.program_id(1).to(tl.int64) * size + begin
    i = tl.arange(0, BLOCK)
    numbers, total = count.to(tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        total += tl.load(x + start + i, mask=start + i < count, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / numbers
    # In a second pass, for numbers that are large beside their deviation; it also finds what rounding left in the mean.
    left, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        inside = start + i < count
        deviation = tl.where(inside, tl.load(x + start + i, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
        left += deviation
        squares += deviation * deviation
    correction = tl.sum(left, 0) / numbers
    moments += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(moments, mean + correction)
    tl.store(moments + 1, tl.sum(squares, 0) - numbers * correction * correction)


@triton.jit(do_not_specialize=["size", "chunk", "parts"])
def norm_kernel(
    x, moments, scale, shift, add, size, chunk, parts, eps, C: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``x[B, T * C]``, normalised by all moments of its item, times ``scale[C]`` plus ``shift[C]`` and, unless it is
    None, ``add``. In place. Program (block of numbers, item)."""
    item = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, PARTS)
    known = part < parts
    count = tl.where(known, tl.minimum(size - part.to(tl.int64) * chunk, chunk), 0).to(tl.float32)
    moments += item * parts * 2
    numbers, first = size.to(tl.float32), tl.load(moments)
    apart = tl.where(known, tl.load(moments + part * 2, mask=known, other=0.0) - first, 0.0)
    further = tl.sum(count * apart, 0) / numbers
    mean, apart = first + further, apart - further
    squares = tl.load(moments + part * 2 + 1, mask=known, other=0.0) + count * apart * apart
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / numbers + eps)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    channel = (at % C).to(tl.int32)
    value = (tl.load(x + item * size + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    value = value * tl.load(scale + channel).to(tl.float32) + tl.load(shift + channel).to(tl.float32)
    if add is not None:
        value += tl.load(add + item * size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + item * size + at, value.to(x.dtype.element_ty), mask=inside)
