"""Random linear layers, and how a result of one is judged."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from torch import Tensor

from aar_kernels.linear import PackedWeight, linear, pack

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
FP8 = torch.float8_e4m3fn  # which the native backend does not have
# Around every width that the kernels cut at: rows of a tile (3, 6, 12) and of a chunk (192), depth of a block (128),
# channels of a panel (16), of a tile (32) and of a group of panels (128).
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 25, 62, 191, 193, 400)
DEPTHS = (1, 2, 7, 100, 127, 128, 129, 256, 257, 700, 1000)
CHANNELS = (1, 7, 15, 16, 17, 33, 100, 127, 129, 300)


class Case(NamedTuple):
    x: Tensor
    packed: PackedWeight
    bias: Tensor | None
    activation: str | None


def make_case(seed: int, dtype: torch.dtype | None = None, **sizes: int) -> Case:
    """Sizes M, K, N that are not given, the dtype, bias and activation are drawn from ``seed``."""
    chance = random.Random(seed)
    drawn = {"M": chance.choice(ROWS), "K": chance.choice(DEPTHS), "N": chance.choice(CHANNELS)} | sizes
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(drawn["N"], drawn["K"], generator=generator) / drawn["K"] ** 0.5
    packed = pack(weight, dtype=dtype or chance.choice(DTYPES))
    bias = torch.randn(drawn["N"], generator=generator) if chance.random() < 0.5 else None
    x = torch.randn(drawn["M"], drawn["K"], generator=generator)
    return Case(x, packed, bias, chance.choice((None, "gelu_tanh")))


def plain(case: Case, dtype: torch.dtype) -> Tensor:
    """What the packed weight stands for, in PyTorch's own operators."""
    bias = None if case.bias is None else case.bias.to(dtype)
    out = F.linear(case.x.to(dtype), case.packed.dequantize().to(dtype), bias)
    return F.gelu(out, approximate="tanh") if case.activation else out


def check(case: Case, backend: str) -> None:
    fast = linear(case.x, case.packed, case.bias, activation=case.activation, backend=backend)
    assert_as_accurate(fast, plain(case, torch.float32).to(case.x.dtype), plain(case, torch.float64))
