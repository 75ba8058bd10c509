"""Linear layers with packed weights in plain PyTorch: the definition that every backend is held to.

The weight is what its stored numbers stand for; activations are not quantised. On CUDA, where the weight lies as
``[N, K]``, this is cuBLAS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight import PackedWeight


def unavailable() -> str | None:
    return None


def unsupported(problem) -> str | None:
    return None


def forward(x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None, N: int, gelu: bool) -> Tensor:
    """``x[M, K]`` fp32 or fp64 -> ``[M, N]`` in its dtype."""
    weight = PackedWeight(data, scale, N).dequantize().to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # fp32 is what the operator promises
        out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out
