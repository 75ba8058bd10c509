"""The compiled CPU backend (csrc). Rows of any mixture of fp32, bf16 and fp16 are widened as they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import library
from .common import contiguous, rows


def unavailable() -> str | None:
    return library.reason


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"compiled for the CPU, but tensors are on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x must be fp32, bf16 or fp16, got {problem.dtype}"
    return None


def forward(x, y, gate, scale, shift, eps, dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aar_native.modulation_forward(
        x.contiguous(), contiguous(y), rows(gate), rows(scale), rows(shift), eps, dtype
    )


def backward(grad_x, grad_modulated, x, y, gate, scale, statistics) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aar_native.modulation_backward(
        contiguous(grad_x), grad_modulated.contiguous(), x.contiguous(), contiguous(y), rows(gate), rows(scale),
        statistics,
    )  # fmt: skip
