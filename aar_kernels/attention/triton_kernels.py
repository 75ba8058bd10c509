"""The kernels of the Triton backend and their pinned block sizes; `triton` launches them.

Shared conventions. Tensors are ``[B, L, H, D]``; those that the caller made come with their strides of batch, token and
head (channels lie side by side), those made here are contiguous. Sums over tokens are ``[B, H, L]`` in fp32.
``ends[L]`` is where the scale of a token ends, which is how far it sees; ``starts[L]`` is where it begins, which is the
first token that sees it. Both grow with the token, so a block of rows needs no key beyond the end of its last row, and
no mask before the end of its first.

Logits are ``g * |q|^-1 * |k|^-1 * (q . k)``: the norms of cosine attention are factors of rows and columns, not of the
operands. So tiles go from memory to the tensor cores untouched (a tile normalised on load would pass through registers
and stop the asynchronous copies), and 16-bit operands are not rounded a second time. Logits and their sums are kept in
units of ln 2, since the hardware's exponential is that of base 2. The maximum runs with the rows, because logits reach
100. No kernel uses atomics: results do not vary from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import LARGEST_LOG_SCALE

LN_100 = tl.constexpr(LARGEST_LOG_SCALE)
LOG2_E = tl.constexpr(1.4426950408889634)
EPSILON = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
LARGEST_INVERSE = tl.constexpr(0.9999e12)  # of a norm above EPSILON, but for rounding
TINY = tl.constexpr(1e-37)

# Pinned block sizes: queries, keys, warps, stages, by kernel, bytes of an element and padded head_dim (64 is 32 too).
# Autotuning is no option, it would time itself inside a user's step. Chosen ahead of time, none measured on a device:
# the largest tiles of those tried that spill nothing. 64 rows rather than 128 because the published 455 tokens are few
# blocks, and the fewer rows a block has, the fewer keys it takes that most of its rows do not see. fp32 products do
# not run on tensor cores, and hold their operands in registers whole: hence the small tiles, and the spills of
# head_dim 128 that remain there.
BLOCKS = {
    ("forward", 2, 64): (64, 64, 4, 3), ("forward", 2, 128): (64, 64, 8, 2),
    ("forward", 4, 64): (32, 32, 4, 2), ("forward", 4, 128): (32, 32, 8, 2),
    ("query_grad", 2, 64): (64, 32, 4, 3), ("query_grad", 2, 128): (64, 64, 8, 2),
    ("query_grad", 4, 64): (32, 32, 4, 2), ("query_grad", 4, 128): (32, 32, 4, 2),
    ("key_grad", 2, 64): (64, 32, 4, 2), ("key_grad", 2, 128): (32, 64, 8, 2),
    ("key_grad", 4, 64): (32, 32, 8, 2), ("key_grad", 4, 128): (32, 32, 8, 2),
    # Of queries the most: a scale of fewer takes the next power of two, at least the 16 of a matrix instruction.
    ("step", 2, 64): (64, 64, 4, 2), ("step", 2, 128): (32, 32, 4, 2),
    ("step", 4, 64): (16, 32, 4, 2), ("step", 4, 128): (16, 32, 8, 2),
}  # fmt: skip
# Where Hopper and later differ: their products take one operand or both from shared memory, which leaves registers for
# wider tiles, but want 64 rows of four warps each.
BLOCKS_HOPPER = {
    ("forward", 2, 128): (128, 64, 8, 2), ("query_grad", 2, 64): (64, 64, 4, 2),
    ("key_grad", 2, 64): (32, 64, 4, 3), ("key_grad", 2, 128): (32, 32, 4, 2),
}  # fmt: skip


def config(kernel: str, capability: int, dim: int, size: int) -> dict[str, int]:
    """Block sizes and launch options of a kernel (``rows``: of those without products), for a major compute capability,
    ``dim`` channels of a head and ``size`` bytes of an element."""
    width = triton.next_power_of_2(dim)
    if kernel == "rows":
        return {"BLOCK_D": width, "BLOCK_M": 1024 // width, "num_warps": 4}
    key = kernel, size, max(width, 64)
    queries, keys, warps, stages = (capability >= 9 and BLOCKS_HOPPER.get(key)) or BLOCKS[key]
    return {"BLOCK_D": width, "BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


@triton.jit
def _tile(base, start, stop, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, INSIDE: tl.constexpr):
    """Rows ``start, start + 1, ...`` of ``base``; zero from row ``stop`` on, unless the tile is said to lie INSIDE."""
    i, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    # 64 bits for the first row alone: what is added for the others fits 32.
    at = base + tl.cast(start, tl.int64) * stride + (i[:, None] * stride + d[None, :])
    if INSIDE and BLOCK_D == D:
        return tl.load(at)
    return tl.load(at, mask=(start + i < stop)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(base, value, start, stop, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    i, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at = base + tl.cast(start, tl.int64) * stride + (i[:, None] * stride + d[None, :])
    tl.store(at, value.to(base.dtype.element_ty), mask=(start + i < stop)[:, None] & (d < D)[None, :])


@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _inverse_norms(rows):
    x = rows.to(tl.float32)
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), EPSILON))


@triton.jit
def _gain(head_log_scale, head, softmax_scale):
    """The factor ``g >= 0`` of a head's logits (its sign is in q), and the same for exponentials of base 2.

    In fp64, one number per program: the fast exponential is off by enough to move logits of 100 by 1e-5.
    """
    gain = tl.cast(softmax_scale, tl.float64)
    if head_log_scale is not None:
        s = tl.load(head_log_scale + head).to(tl.float64)
        gain *= tl.exp(tl.where(s > LN_100, LN_100, s))
    # Where it is zero, it would make NaN of masked logits.
    return gain.to(tl.float32), tl.where(gain < TINY, TINY, gain * LOG2_E).to(tl.float32)


@triton.jit
def _program(length, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Item, head and first row of this program. Blocks of one head come one after the other, to share its keys in the
    cache; LAST_FIRST starts with those at the end of the sequence, which take longest where rows look back."""
    blocks = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0)
    block = pid % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    return (pid // blocks // heads).to(tl.int64), pid // blocks % heads, block * BLOCK


@triton.jit(do_not_specialize=["length", "heads"])
def norm_kernel(
    norms, x, x_strides, length, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """``norms[B, H, L] = 1 / |x|``. Program (item, head, block of rows).

    A kernel of its own for the keys, since inside the loops over keys their norms take so many registers that tiles
    would have to halve (counted for sm_80 and sm_90).
    """
    item, head, row = _program(length, heads, BLOCK_M, False)
    i = row + tl.arange(0, BLOCK_M)
    x += item * x_strides[0] + head * x_strides[2]
    rows = _tile(x, row, length, x_strides[1], BLOCK_M, D, BLOCK_D, False)
    tl.store(norms + (item * heads + head) * length + i, _inverse_norms(rows), mask=i < length)


@triton.jit
def _softmax_step(acc, total, highest, logits, row_scale, values):
    """One tile of the running softmax. ``logits`` lack the factor ``row_scale > 0``, which goes into one fused multiply
    with the subtraction of the maximum."""
    above = tl.maximum(highest, tl.max(logits, 1) * row_scale)
    p = tl.exp2(logits * row_scale[:, None] - above[:, None])
    fade = tl.exp2(highest - above)
    acc = _dot(p.to(values.dtype), values, acc * fade[:, None])
    return acc, total * fade + tl.sum(p, 1), above


@triton.jit
def _visible_keys(
    acc, total, highest, broken, q, row_scale, end, k, v, k_norms, k_stride, v_stride, first, last,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys ``first <= j < last``, of which a row sees those before its ``end`` (all, unless MASKED)."""
    for start in tl.range(first, last, BLOCK_N):
        keys = _tile(k, start, last, k_stride, BLOCK_N, D, BLOCK_D, not MASKED)
        values = _tile(v, start, last, v_stride, BLOCK_N, D, BLOCK_D, not MASKED)
        logits = _dot(q, keys.T)
        j = start + tl.arange(0, BLOCK_N)
        if k_norms is not None:
            logits *= tl.load(k_norms + j, mask=j < last, other=0.0)[None, :]
        if MASKED:
            logits = tl.where(j[None, :] < end[:, None], logits, float("-inf"))
            # A weight of 0 does not hide a NaN or Inf from the product, so it is taken out, and remembered.
            sound = tl.abs(values.to(tl.float32)) < float("inf")
            broken = tl.minimum(broken, tl.min(tl.where(tl.min(sound.to(tl.int32), 1) > 0, last, j), 0))
            values = tl.where(sound, values, 0.0)
        acc, total, highest = _softmax_step(acc, total, highest, logits, row_scale, values)
    return acc, total, highest, broken


@triton.jit(do_not_specialize=["length", "heads"])
def forward_kernel(
    out, lse, q, k, v, k_norms, head_log_scale, ends, q_strides, k_strides, v_strides, length, heads, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out`` and ``lse[B, H, L]``. Program (item, head, block of queries)."""
    item, head, row = _program(length, heads, BLOCK_M, True)
    q += item * q_strides[0] + head * q_strides[2]
    k += item * k_strides[0] + head * k_strides[2]
    v += item * v_strides[0] + head * v_strides[2]
    rows = (item * heads + head) * length

    i = row + tl.arange(0, BLOCK_M)
    end = tl.load(ends + i, mask=i < length, other=length)
    whole = tl.load(ends + row) // BLOCK_N * BLOCK_N
    last = tl.load(ends + tl.minimum(row + BLOCK_M, length) - 1)
    queries = _tile(q, row, length, q_strides[1], BLOCK_M, D, BLOCK_D, False)
    _, row_scale = _gain(head_log_scale, head, softmax_scale)
    row_scale += tl.zeros([BLOCK_M], tl.float32)
    if k_norms is not None:
        k_norms += rows
        row_scale *= _inverse_norms(queries)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, total, highest, broken = _visible_keys(
        acc, total, highest, length, queries, row_scale, end, k, v, k_norms, k_strides[1], v_strides[1],
        0, whole, False, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, total, highest, broken = _visible_keys(
        acc, total, highest, broken, queries, row_scale, end, k, v, k_norms, k_strides[1], v_strides[1],
        whole, last, True, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc = tl.where((broken < end)[:, None], float("nan"), acc / total[:, None])
    out += (item * length * heads + head) * D
    _store(out, acc, row, length, heads * D, BLOCK_M, D, BLOCK_D)
    tl.store(lse + rows + i, highest + tl.log2(total), mask=i < length)


@triton.jit
def _weights(logits, row_scale, log_sum, seen, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """The softmax once more, from the logarithm of its sum; rows of queries lie along AXIS."""
    p = tl.exp2(logits * tl.expand_dims(row_scale, 1 - AXIS) - tl.expand_dims(log_sum, 1 - AXIS))
    return tl.where(seen, p, 0.0) if MASKED else p


@triton.jit
def _through_normalisation(grad, rows, inverse_norms):
    """Gradient of ``rows``, given that of ``rows / |rows|``. Below EPSILON the norm is a constant."""
    unit = tl.where((inverse_norms < LARGEST_INVERSE)[:, None], rows.to(tl.float32) * inverse_norms[:, None], 0.0)
    return inverse_norms[:, None] * (grad - unit * tl.sum(unit * grad, 1)[:, None])


@triton.jit
def _seen_keys(
    dq, total, delta, queries, g, row_scale, log_sum, balance, end, k, v, k_norms, k_stride, v_stride, first, last,
    MASKED: tl.constexpr, SUMS: tl.constexpr, EXACT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys ``first <= j < last``, of which a row sees those before its ``end`` (all, unless MASKED): either the
    gradient ``dq``, or (SUMS) of the weights their ``total`` and, times their gradients, ``delta``."""
    for start in tl.range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        keys = _tile(k, start, last, k_stride, BLOCK_N, D, BLOCK_D, not MASKED)
        values = _tile(v, start, last, v_stride, BLOCK_N, D, BLOCK_D, not MASKED)
        logits = _dot(queries, keys.T)
        if k_norms is not None:
            k_norm = tl.load(k_norms + j, mask=j < last, other=0.0)
            logits *= k_norm[None, :]
        p = _weights(logits, row_scale, log_sum, j[None, :] < end[:, None], 0, MASKED)
        dp = _dot(g, values.T)
        if SUMS:
            total += tl.sum(p, 1)
            delta += tl.sum(p * dp, 1)
        else:
            ds = p * (dp - delta[:, None])
            if EXACT:
                ds *= balance[:, None]
            if k_norms is not None:
                ds *= k_norm[None, :]
            dq = _dot(ds.to(keys.dtype), keys, dq)
    return dq, total, delta


@triton.jit(do_not_specialize=["length", "heads"])
def query_grad_kernel(
    dq, d_scale, deltas, q_norms, balances, grad, out, q, k, v, k_norms, head_log_scale, ends, lse,
    grad_strides, q_strides, k_strides, v_strides, length, heads, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of queries, and ``d_scale[B, H, blocks]``, what each block adds to the gradient of ``ln g``. Program
    (item, head, block of queries).

    Leaves for `key_grad_kernel` what it needs of each row: ``deltas``, the sum of the weights times their gradients;
    ``q_norms``, ``1 / |q|`` (None unless cosine); ``balances`` (None for 16-bit types), see below.

    The usual ``delta = grad . out`` and ``exp(logit - lse)`` are off by the rounding of ``out`` and ``lse``: with
    logits of 100, too far for fp32, where a weight near 1 should leave no gradient. So there, ``delta`` is summed from
    the very weights and gradients it goes with, and weights are divided by their sum: ``balances`` is its inverse.
    """
    item, head, row = _program(length, heads, BLOCK_M, True)
    q += item * q_strides[0] + head * q_strides[2]
    k += item * k_strides[0] + head * k_strides[2]
    v += item * v_strides[0] + head * v_strides[2]
    grad += item * grad_strides[0] + head * grad_strides[2]
    made = (item * length * heads + head) * D
    i = row + tl.arange(0, BLOCK_M)
    at = (item * heads + head) * length + i
    EXACT: tl.constexpr = balances is not None

    end = tl.load(ends + i, mask=i < length, other=length)
    whole = tl.load(ends + row) // BLOCK_N * BLOCK_N
    last = tl.load(ends + tl.minimum(row + BLOCK_M, length) - 1)
    queries = _tile(q, row, length, q_strides[1], BLOCK_M, D, BLOCK_D, False)
    g = _tile(grad, row, length, grad_strides[1], BLOCK_M, D, BLOCK_D, False)
    # Infinity makes the weights of rows beyond the sequence zero.
    log_sum = tl.load(lse + at, mask=i < length, other=float("inf"))
    gain, row_scale = _gain(head_log_scale, head, softmax_scale)
    row_scale += tl.zeros([BLOCK_M], tl.float32)
    if k_norms is not None:
        k_norms += (item * heads + head) * length
        q_norm = _inverse_norms(queries)
        row_scale *= q_norm
        tl.store(q_norms + at, q_norm, mask=i < length)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    balance = tl.zeros([BLOCK_M], tl.float32)
    if EXACT:
        acc, total, delta = _seen_keys(
            acc, balance, balance, queries, g, row_scale, log_sum, balance, end, k, v, k_norms,
            k_strides[1], v_strides[1], 0, last, True, True, EXACT, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        balance = 1.0 / tl.where(i < length, total, 1.0)
        delta *= balance
        tl.store(balances + at, balance, mask=i < length)
    else:
        o = _tile(out + made, row, length, heads * D, BLOCK_M, D, BLOCK_D, False)
        delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(deltas + at, delta, mask=i < length)

    acc, balance, delta = _seen_keys(
        acc, balance, delta, queries, g, row_scale, log_sum, balance, end, k, v, k_norms,
        k_strides[1], v_strides[1], 0, whole, False, False, EXACT, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, balance, delta = _seen_keys(
        acc, balance, delta, queries, g, row_scale, log_sum, balance, end, k, v, k_norms,
        k_strides[1], v_strides[1], whole, last, True, False, EXACT, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc *= gain
    if k_norms is not None:
        unit = queries.to(tl.float32) * q_norm[:, None]
        tl.store(d_scale + (item * heads + head) * tl.cdiv(length, BLOCK_M) + row // BLOCK_M, tl.sum(unit * acc))
        acc = _through_normalisation(acc, queries, q_norm)
    _store(dq + made, acc, row, length, heads * D, BLOCK_M, D, BLOCK_D)


@triton.jit
def _seeing_queries(
    dk, dv, keys, values, k_norm, head_scale, n, q, grad, ends, lse, deltas, q_norms, balances, q_stride, grad_stride,
    first, last, length,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The queries ``first <= i < last``, which see the keys ``n`` (only those before ``ends[i]`` if MASKED). Keys are
    the rows here, so that no product needs the weights transposed."""
    for start in tl.range(first, last, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        queries = _tile(q, start, length, q_stride, BLOCK_M, D, BLOCK_D, False)
        g = _tile(grad, start, length, grad_stride, BLOCK_M, D, BLOCK_D, False)
        log_sum = tl.load(lse + i, mask=i < length, other=float("inf"))
        delta = tl.load(deltas + i, mask=i < length, other=0.0)
        end = tl.load(ends + i, mask=i < length, other=length)
        row_scale = tl.zeros([BLOCK_M], tl.float32) + head_scale
        if balances is None:
            logits = _dot(keys, queries.T)
        else:  # the roundings of `_seen_keys`, without which the balance is none
            logits = _dot(queries, keys.T).T
        if q_norms is not None:
            q_norm = tl.load(q_norms + i, mask=i < length, other=0.0)
            row_scale *= q_norm
            logits *= k_norm[:, None]
        p = _weights(logits, row_scale, log_sum, n[:, None] < end[None, :], 1, MASKED)
        if balances is not None:
            p *= tl.load(balances + i, mask=i < length, other=0.0)[None, :]
        dv = _dot(p.to(g.dtype), g, dv)
        ds = p * (_dot(values, g.T) - delta[None, :])
        if q_norms is not None:
            ds *= q_norm[None, :]
        dk = _dot(ds.to(queries.dtype), queries, dk)
    return dk, dv


@triton.jit(do_not_specialize=["length", "heads"])
def key_grad_kernel(
    dk, dv, grad, q, k, v, head_log_scale, starts, ends, lse, deltas, q_norms, balances,
    grad_strides, q_strides, k_strides, v_strides, length, heads, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. Program (item, head, block of keys)."""
    item, head, column = _program(length, heads, BLOCK_N, False)
    q += item * q_strides[0] + head * q_strides[2]
    k += item * k_strides[0] + head * k_strides[2]
    v += item * v_strides[0] + head * v_strides[2]
    grad += item * grad_strides[0] + head * grad_strides[2]
    rows = (item * heads + head) * length
    lse += rows
    deltas += rows
    if balances is not None:
        balances += rows

    n = column + tl.arange(0, BLOCK_N)
    keys = _tile(k, column, length, k_strides[1], BLOCK_N, D, BLOCK_D, False)
    values = _tile(v, column, length, v_strides[1], BLOCK_N, D, BLOCK_D, False)
    k_norm = tl.zeros([BLOCK_N], tl.float32)
    if q_norms is not None:
        q_norms += rows
        k_norm = _inverse_norms(keys)
    gain, head_scale = _gain(head_log_scale, head, softmax_scale)
    # From the first row that sees the first key to the first that sees all of the block, and on to the end.
    first = tl.load(starts + column) // BLOCK_M * BLOCK_M
    whole = tl.cdiv(tl.load(starts + tl.minimum(column + BLOCK_N, length) - 1), BLOCK_M) * BLOCK_M
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_k, acc_v = _seeing_queries(
        acc_k, acc_v, keys, values, k_norm, head_scale, n, q, grad, ends, lse, deltas, q_norms, balances,
        q_strides[1], grad_strides[1], first, tl.minimum(whole, length), length, True, D, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    acc_k, acc_v = _seeing_queries(
        acc_k, acc_v, keys, values, k_norm, head_scale, n, q, grad, ends, lse, deltas, q_norms, balances,
        q_strides[1], grad_strides[1], whole, length, length, False, D, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    acc_k *= gain
    if q_norms is not None:
        acc_k = _through_normalisation(acc_k, keys, k_norm)
    made = (item * length * heads + head) * D
    _store(dk + made, acc_k, column, length, heads * D, BLOCK_N, D, BLOCK_D)
    _store(dv + made, acc_v, column, length, heads * D, BLOCK_N, D, BLOCK_D)


@triton.jit
def _cached_keys(
    acc, total, highest, queries, row_scale, k, v, k_stride, v_stride, first, last,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The cached keys ``first <= j < last``, which all queries see."""
    for start in tl.range(first, last, BLOCK_N):
        keys = _tile(k, start, last, k_stride, BLOCK_N, D, BLOCK_D, False)
        values = _tile(v, start, last, v_stride, BLOCK_N, D, BLOCK_D, False)
        j = start + tl.arange(0, BLOCK_N)
        logits = tl.where((j < last)[None, :], _dot(queries, keys.T), float("-inf"))
        acc, total, highest = _softmax_step(acc, total, highest, logits, row_scale, values)
    return acc, total, highest


@triton.jit(do_not_specialize=["start", "count", "heads", "chunk"])
def step_kernel(
    out, lse, q, k, v, cache_k, cache_v, head_log_scale, q_strides, k_strides, v_strides, cache_k_strides,
    cache_v_strides, start, count, heads, chunk, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of ``count`` new tokens to ``start`` cached ones and to themselves. Program (item and head, block of
    queries, split of the keys).

    Split ``s`` takes the keys ``s * chunk <= j < (s + 1) * chunk`` and writes ``out[splits, B, count, H, D]`` and
    ``lse[splits, B, count, H]`` (``lse`` is None if there is but one). New keys and values come from the arguments, so
    that no program waits for another; the first block of queries also writes them into the cache, where nobody reads.
    """
    item = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    row = tl.program_id(1) * BLOCK_M
    split = tl.program_id(2)
    q += item * q_strides[0] + head * q_strides[2]
    k += item * k_strides[0] + head * k_strides[2]
    v += item * v_strides[0] + head * v_strides[2]
    cache_k += item * cache_k_strides[0] + head * cache_k_strides[2]
    cache_v += item * cache_v_strides[0] + head * cache_v_strides[2]

    queries = _tile(q, row, count, q_strides[1], BLOCK_M, D, BLOCK_D, False)
    _, row_scale = _gain(head_log_scale, head, softmax_scale)
    row_scale += tl.zeros([BLOCK_M], tl.float32)
    if head_log_scale is not None:
        row_scale *= _inverse_norms(queries)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)

    first = split * chunk
    last = tl.minimum(first + chunk, start + count)
    acc, total, highest = _cached_keys(
        acc, total, highest, queries, row_scale, cache_k, cache_v, cache_k_strides[1], cache_v_strides[1],
        first, tl.minimum(last, start), D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    # A pass of its own over the new keys: they lie elsewhere, and are normalised and stored.
    for new in tl.range(tl.maximum(first - start, 0), last - start, BLOCK_N):
        keys = _tile(k, new, last - start, k_strides[1], BLOCK_N, D, BLOCK_D, False)
        values = _tile(v, new, last - start, v_strides[1], BLOCK_N, D, BLOCK_D, False)
        if head_log_scale is not None:
            keys = (keys.to(tl.float32) * _inverse_norms(keys)[:, None]).to(keys.dtype)
        if row == 0:
            _store(cache_k, keys, start + new, last, cache_k_strides[1], BLOCK_N, D, BLOCK_D)
            _store(cache_v, values, start + new, last, cache_v_strides[1], BLOCK_N, D, BLOCK_D)
        j = new + tl.arange(0, BLOCK_N)
        logits = tl.where((j < last - start)[None, :], _dot(queries, keys.T), float("-inf"))
        acc, total, highest = _softmax_step(acc, total, highest, logits, row_scale, values)

    part = split * (tl.num_programs(0) // heads) + item
    out += (part * count * heads + head) * D
    _store(out, acc / total[:, None], row, count, heads * D, BLOCK_M, D, BLOCK_D)
    if lse is not None:
        i = row + tl.arange(0, BLOCK_M)
        tl.store(lse + (part * count + i) * heads + head, highest + tl.log2(total), mask=i < count)


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(out, parts, lse, rows, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """``out[rows, D]`` from the ``splits`` results of `step_kernel`, in their order. Program (block of rows)."""
    start = tl.program_id(0) * BLOCK_M
    i = start + tl.arange(0, BLOCK_M)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(splits):
        first = tl.cast(split, tl.int64) * rows
        part = _tile(parts + first * D, start, rows, D, BLOCK_M, D, BLOCK_D, False)
        log_sum = tl.load(lse + first + i, mask=i < rows, other=0.0)
        above = tl.maximum(highest, log_sum)
        fade, weight = tl.exp2(highest - above), tl.exp2(log_sum - above)
        acc = acc * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        highest = above
    _store(out, acc / total[:, None], start, rows, D, BLOCK_M, D, BLOCK_D)
