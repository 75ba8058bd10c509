"""The kernel of the Triton backend and its launch options; `triton` launches it. The steps are those of `reference`.

A program holds one token's logits in registers. Nothing is sorted: both filters keep the values at or above a
threshold that a bisection finds, over the patterns of floats, which are ordered as the floats are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import common

MAX_VOCABULARY = 1 << 14  # what the registers of one program hold

BITS = tl.constexpr(common.BITS)
LOWEST = tl.constexpr(common.LOWEST)
ROUND = tl.constexpr(common.ROUND)
ROUND_BITS = tl.constexpr(common.ROUND_BITS)
MESSAGE = tl.constexpr(common.MESSAGE)
C0, C1, C2, C3, C4 = (tl.constexpr(coefficient) for coefficient in common.EXP2)


def options(vocabulary: int) -> dict[str, int | bool]:
    """Products and sums are rounded one by one (no fusion), as everywhere else. Up to 1024 codes a program is one
    warp, which needs no barrier at the many sums of a bisection."""
    block = max(triton.next_power_of_2(vocabulary), 32)
    return {"BLOCK": block, "num_warps": max(block // 1024, 1), "enable_fp_fusion": False}


@triton.jit
def _key(value):
    """The pattern of a float as an integer in the order of the floats."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bisect(values, weights, lowest: tl.constexpr, highest, total, needed):
    """The largest threshold for which the weights of the values at or above it (``total`` for ``lowest``) sum to at
    least ``needed``, or another that keeps the same values. Weights are 1 each (None), or the values as integers.

    ``highest`` is the largest of the values. Also returns the sum that the threshold keeps."""
    lo = _key(tl.full([], lowest, tl.float32))
    hi = _key(highest) + 1
    of_lo = total
    of_hi = tl.zeros_like(total)
    least = of_hi + 1
    # Where the sums differ by less than two values, no threshold between tells more apart.
    while (of_lo > needed) & (hi > lo + 1) & (of_lo - of_hi >= 2 * least):
        middle = (lo & hi) + ((lo ^ hi) >> 1)  # their mean, without their sum, which might overflow
        threshold = _value(middle)
        if weights is None:
            reached = tl.sum((values >= threshold).to(tl.int32))
        else:
            reached = tl.sum(tl.where(values >= threshold, weights, 0).to(tl.int64))
        enough = reached >= needed
        lo = tl.where(enough, middle, lo)
        hi = tl.where(enough, hi, middle)
        of_lo = tl.where(enough, reached, of_lo)
        of_hi = tl.where(enough, of_hi, reached)
        if weights is not None:
            least = tl.where(enough, threshold.to(tl.int64), least)
    return _value(lo), of_lo


@triton.jit
def _weights(t):
    """``floor(2^BITS * 2^t)``"""
    t = tl.where(t > LOWEST, t, LOWEST)
    shifted = t + ROUND
    f = t - (shifted - ROUND)
    power = f * C4
    power = (power + C3) * f
    power = (power + C2) * f
    power = (power + C1) * f
    power = (power + C0) * f
    power = power + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) - (ROUND_BITS - BITS)
    power = (power.to(tl.int32, bitcast=True) + (exponent << 23)).to(tl.float32, bitcast=True)
    return power.to(tl.int32)


@triton.jit
def _uniform(seed, token):
    """53 bits of Philox4x32-10 as a number in [0, 1)."""
    zero = tl.zeros([], tl.uint32)
    high, low, _, _ = tl.philox(seed, token.to(tl.uint32), (token >> 32).to(tl.uint32), zero, zero)
    bits = (high.to(tl.uint64) << 21) | (low.to(tl.uint64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit(do_not_specialize=["position", "tokens", "vocabulary", "top_k"])
def sample_kernel(
    codes, logits, uncond, seeds, position, tokens, vocabulary, conditional, unconditional, scale, top_k,
    top_p: tl.float64, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``codes[B, tokens]`` of ``logits[B, tokens, vocabulary]``. Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK)
    at = row * vocabulary + v
    x = tl.load(logits + at, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
    if uncond is not None:
        other = tl.load(uncond + at, mask=v < vocabulary, other=0.0).to(tl.float32)
        x = tl.where(x == float("-inf"), x, x * conditional - other * unconditional)
    largest = tl.max(x)
    tl.device_assert((tl.max((x < float("inf")).to(tl.int32) ^ 1) == 0) & (largest > float("-inf")), MESSAGE)
    if GREEDY:
        code = tl.min(tl.where(x == largest, v, BLOCK))
    else:
        weights = _weights((x - largest) * scale)
        if TOP_K:
            size = tl.full([], BLOCK, tl.int32)
            kth, _ = _bisect(x, None, float("-inf"), largest, size, top_k)
            weights = tl.where(x >= kth, weights, 0)
        total = tl.sum(weights.to(tl.int64))
        if TOP_P:
            needed = tl.ceil(total.to(tl.float64) * top_p).to(tl.int64)
            values = weights.to(tl.float32)  # exact: a weight has 24 bits of precision
            least, total = _bisect(values, weights, 1.0, tl.max(values), total, needed)
            weights = tl.where(values >= least, weights, 0)
        u = _uniform(tl.load(seeds + row // tokens), position.to(tl.int64) + row % tokens)
        target = (u * total.to(tl.float64)).to(tl.int64)
        code = tl.sum((tl.cumsum(weights.to(tl.int64), 0) <= target).to(tl.int32))
    tl.store(codes + row, code.to(tl.int64))
