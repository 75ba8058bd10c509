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
    if problem.dtype != torch.float32:
        return f"computes in float32, not in {problem.dtype}"
    return None


def forward(x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None, N: int, gelu: bool) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    return torch.ops.aar_native.linear_forward(x.contiguous(), data, scale, bias, N, gelu)
