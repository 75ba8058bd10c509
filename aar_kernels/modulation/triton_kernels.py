"""Triton kernels of adaptive layer normalisation. Rows are held whole, in fp32, whatever they are stored as.

``x, y`` and what is like them are contiguous ``[B, L, C]``; ``gate, scale, shift`` have a stride between the rows of
two items. None stands for what is not there: then nothing of it is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_ROWS = 8  # rows that share a partial sum
REDUCE = {"BLOCK_C": 128, "num_warps": 1}


def row_block(channels: int) -> dict[str, int]:
    """Constants of the kernels that hold rows: up to eight numbers of a row for each thread."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK_C": block, "num_warps": min(max(block // 256, 1), 16)}


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "gate_stride", "scale_stride", "shift_stride", "eps"])
def forward_kernel(
    x, y, gate, scale, shift, x_new, modulated, statistics, tokens, gate_stride, scale_stride, shift_stride, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of all items' rows."""
    row = tl.program_id(0).to(tl.int64)
    item = row // tokens
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    value = _load(x + row * C + c, inside)
    if y is not None:
        value += _load(gate + item * gate_stride + c, inside) * _load(y + row * C + c, inside)
        rounded = value.to(x_new.dtype.element_ty)
        tl.store(x_new + row * C + c, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / C
    centred = tl.where(inside, value - mean, 0.0)
    # A mean of large numbers is rounded coarsely; what it is off by shows in the mean of the differences.
    correction = tl.sum(centred, 0) / C
    mean += correction
    centred = tl.where(inside, value - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, rstd)
    result = centred * rstd * (1 + _load(scale + item * scale_stride + c, inside))
    result += _load(shift + item * shift_stride + c, inside)
    tl.store(modulated + row * C + c, result.to(modulated.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "gate_stride", "scale_stride"])
def backward_kernel(
    grad_x_new, grad_modulated, x, y, gate, scale, statistics, grad_x, grad_y, partial, tokens, gate_stride,
    scale_stride, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of the item ``program_id(0)``, and their sums: ``partial[B, blocks, 2 or 3, C]``."""
    item = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    factor = 1 + _load(scale + item * scale_stride + c, inside)
    scale_sum = tl.zeros([BLOCK_C], tl.float32)
    shift_sum = tl.zeros([BLOCK_C], tl.float32)
    gate_sum = tl.zeros([BLOCK_C], tl.float32)
    for token in range(block * ROWS, min(block * ROWS + ROWS, tokens)):
        row = item * tokens + token
        at = row * C + c
        rstd = tl.load(statistics + 2 * row + 1)
        normal = tl.where(inside, (_load(x + at, inside) - tl.load(statistics + 2 * row)) * rstd, 0.0)
        grad = _load(grad_modulated + at, inside)
        scale_sum += grad * normal
        shift_sum += grad
        by_normal = grad * factor
        grad = rstd * (by_normal - tl.sum(by_normal, 0) / C - normal * (tl.sum(by_normal * normal, 0) / C))
        if grad_x_new is not None:
            grad += _load(grad_x_new + at, inside)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        if y is not None:
            # Read anew for each row, from the cache: held all along it would take registers from the sums.
            by_y = grad * _load(gate + item * gate_stride + c, inside)
            tl.store(grad_y + at, by_y.to(grad_y.dtype.element_ty), mask=inside)
            gate_sum += grad * _load(y + at, inside)
    sums: tl.constexpr = 2 if y is None else 3
    partial += (item * tl.num_programs(1) + block) * sums * C
    tl.store(partial + c, scale_sum, mask=inside)
    tl.store(partial + C + c, shift_sum, mask=inside)
    if y is not None:
        tl.store(partial + 2 * C + c, gate_sum, mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def reduce_kernel(partial, sums, blocks, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """``sums[kinds, B, C]`` of ``partial[B, blocks, kinds, C]``. Program (item, kind, block of channels)."""
    item = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for block in range(blocks):
        total += _load(partial + ((item * blocks + block) * tl.num_programs(1) + kind) * C + c, c < C)
    tl.store(sums + (kind * tl.num_programs(0) + item) * C + c, total, mask=c < C)
