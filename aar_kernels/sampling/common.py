"""The numbers that make every backend draw the same codes from a seed: csrc and the Triton kernel mirror them.

A token's probability is an integer weight, ``floor(2^30 * 2^t)`` with ``t = (x - largest x) * scale`` and
``scale = log2(e) / temperature``. Every step is one fp32 operation of a fixed order, rounded to nearest, never
contracted to a fused multiply-add:

    t = max(t, LOWEST)                             a token that far below the most probable one weighs 0
    i = (t + ROUND) - ROUND, f = t - i             the nearest integer, and -1/2 <= f <= 1/2 (exact)
    2^f = 1 + f * (C[0] + f * (C[1] + ...))        within 1.9e-7 of it, in 5 products and 5 sums
    weight = int(2^f with 30 + i added to its exponent)

Integers add up exactly in any order, so that neither threads nor the order of a reduction can change a code.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

BITS = 30  # the most probable token weighs 2^BITS; 2^16 tokens then sum to less than the 2^53 that a double holds
MAX_VOCABULARY = 1 << 16
LOWEST = -32.0
ROUND = 12582912.0  # 1.5 * 2^23: adding it to a small number, in fp32, rounds that to an integer
ROUND_BITS = 0x4B400000  # its fp32 pattern
# Minimax over -1/2..1/2 of the relative error, as fp32 numbers.
EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
MESSAGE = "logits must be neither NaN nor +inf, with guidance too, and each token needs one that is finite"


class Factors(NamedTuple):
    """The settings as the kernels use them; each is a number that fp32 holds exactly."""

    conditional: float  # guided = conditional * logits - unconditional * uncond
    unconditional: float
    scale: float  # of the exponent; 0 stands for temperature 0: take the most probable token


def factors(guidance: float, temperature: float) -> Factors:
    scale = 0.0
    if temperature > 0:
        # Neither inf, which times a zero is NaN, nor 0, which means something else.
        scale = min(max(math.log2(math.e) / temperature, 1e-37), 3e38)
    return Factors(*(ctypes.c_float(factor).value for factor in (1 + guidance, guidance, scale)))
