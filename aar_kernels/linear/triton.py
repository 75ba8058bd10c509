"""Triton backend (the kernel: `triton_kernels`): it reads weights as they are stored, and x in its own dtype.

Many rows by a weight of their own dtype are a plain matrix product, bound by arithmetic: PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._triton import INTERPRETED, unavailable, wrong_device  # noqa: F401
from . import triton_kernels as kernels
from .weight import PackedWeight

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def unsupported(problem) -> str | None:
    if reason := wrong_device(problem):
        return reason
    if problem.dtype not in _TYPES:
        return f"x must be fp32, bf16 or fp16, got {problem.dtype}"
    return None


def forward(x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None, N: int, gelu: bool) -> Tensor:
    (M, K), rows = x.shape, PackedWeight(data, scale, N).rows
    out = x.new_empty(M, N)
    if M == 0:
        return out
    if M > kernels.MANY_ROWS and x.dtype == rows.dtype:
        with torch.autocast(x.device.type, enabled=False):
            out = F.linear(x, rows, None if bias is None else bias.to(x.dtype))
        return F.gelu(out, approximate="tanh") if gelu else out
    # What holds the numbers of both: those of int8 and fp8 fit either half. Products are then exact in fp32.
    dtype = _TYPES[x.dtype if scale is not None or rows.dtype == x.dtype else torch.float32]
    if rows.dtype == torch.float8_e4m3fn:
        rows = rows.view(torch.uint8)  # which every GPU has
    bias = None if bias is None else bias.contiguous()
    options = kernels.options(M, dtype)
    if INTERPRETED and dtype == tl.bfloat16:
        dtype = tl.float32  # the interpreter's tl.dot multiplies the bits of bf16
    with torch.cuda.device_of(x):
        kernels.linear_kernel[triton.cdiv(N, options["BLOCK_N"]), triton.cdiv(M, options["BLOCK_M"])](
            x.contiguous(), rows.contiguous(), scale, bias, out, M, N=N, K=K, GELU=gelu, DTYPE=dtype, **options
        )
    return out
