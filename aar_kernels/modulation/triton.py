"""Triton backend (kernels: `triton_kernels`): forward in one launch, backward in two, without atomics."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._triton import unavailable, wrong_device  # noqa: F401
from . import triton_kernels as kernels
from .common import contiguous, rows

MAX_CHANNELS = 16384  # of a row that one program holds


def unsupported(problem) -> str | None:
    if reason := wrong_device(problem):
        return reason
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x must be fp32, bf16 or fp16, got {problem.dtype}"
    if problem.dim is not None and problem.dim > MAX_CHANNELS:
        return f"up to {MAX_CHANNELS} channels, got {problem.dim}"
    return None


def forward(x, y, gate, scale, shift, eps, dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, y, gate, scale, shift = x.contiguous(), contiguous(y), rows(gate), rows(scale), rows(shift)
    batch, tokens, channels = x.shape
    x_new = None if y is None else torch.empty_like(x)
    modulated = torch.empty_like(x, dtype=dtype)
    statistics = x.new_empty(batch, tokens, 2, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            kernels.forward_kernel[(batch * tokens,)](
                x, y, gate, scale, shift, x_new, modulated, statistics, tokens, _stride(gate), scale.stride(0),
                shift.stride(0), eps, C=channels, **kernels.row_block(channels),
            )  # fmt: skip
    return x.new_empty(0) if x_new is None else x_new, modulated, statistics


def backward(grad_x_new, grad_modulated, x, y, gate, scale, statistics) -> tuple[Tensor, Tensor, Tensor]:
    grad_x_new, grad_modulated, x, y = map(contiguous, (grad_x_new, grad_modulated, x, y))
    gate, scale = rows(gate), rows(scale)
    batch, tokens, channels = x.shape
    grad_x, grad_y = torch.empty_like(x), None if y is None else torch.empty_like(y)
    kinds, blocks = 2 if y is None else 3, triton.cdiv(tokens, kernels.BLOCK_ROWS)
    partial = x.new_empty(batch, blocks, kinds, channels, dtype=torch.float32)
    sums = x.new_zeros(kinds, batch, channels, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            kernels.backward_kernel[(batch, blocks)](
                grad_x_new, grad_modulated, x, y, gate, scale, statistics, grad_x, grad_y, partial, tokens,
                _stride(gate), scale.stride(0), C=channels, ROWS=kernels.BLOCK_ROWS, **kernels.row_block(channels),
            )  # fmt: skip
            kernels.reduce_kernel[(batch, kinds, triton.cdiv(channels, kernels.REDUCE["BLOCK_C"]))](
                partial, sums, blocks, C=channels, **kernels.REDUCE
            )
    return grad_x, x.new_empty(0) if grad_y is None else grad_y, sums


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
