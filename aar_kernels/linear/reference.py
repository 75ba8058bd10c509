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
    """``x[M, K]`` -> ``[M, N]`` in its dtype, computed in fp32, or in fp64 for fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = PackedWeight(data, scale, N).dequantize().to(wide), None if bias is None else bias.to(wide)
    with torch.autocast(x.device.type, enabled=False):  # fp32 is what the operator promises
        out = F.linear(x.to(wide), weight, bias)
    return (F.gelu(out, approximate="tanh") if gelu else out).to(x.dtype)
