"""The compiled CPU backend (csrc): reads packed weights as they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import library


def unavailable() -> str | None:
    return library.reason


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"compiled for the CPU, but tensors are on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, not in {problem.dtype}"
    if "fp8" in problem.needs:
        return "has no fp8: on a CPU, int8 is faster and more exact"
    return None


def forward(x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None, N: int, gelu: bool) -> Tensor:
    bias = None if bias is None else bias.float().contiguous()
    return torch.ops.aar_native.linear_forward(x.float().contiguous(), data, scale, bias, N, gelu).to(x.dtype)
