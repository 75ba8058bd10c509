"""The compiled CPU backend (csrc): tensors are read where they lie, also as views of one projection.

bf16 and fp16 are formats of storage here: every sum and every weight is fp32.
"""

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
        return f"q, k and v must be float32, bfloat16 or float16, got {problem.dtype}"
    return None


def forward(q, k, v, head_log_scale, lengths, softmax_scale) -> tuple[Tensor, Tensor]:
    tensors = map(_readable, (q, k, v))
    return torch.ops.aar_native.attention_forward(*tensors, _floats(head_log_scale), lengths, softmax_scale)


def backward(grad, q, k, v, head_log_scale, out, lse, lengths, softmax_scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The product of the output and its gradient is summed from fp32 weights instead: `out` may be rounded to 16 bits.
    tensors = map(_readable, (grad, q, k, v))
    scale = _floats(head_log_scale)
    return torch.ops.aar_native.attention_backward(*tensors, scale, lse.contiguous(), lengths, softmax_scale)


def step(q, k, v, cache_k, cache_v, head_log_scale, start, softmax_scale) -> Tensor:
    tensors = map(_readable, (q, k, v))
    scale = _floats(head_log_scale)
    out = torch.ops.aar_native.attention_step(*tensors, cache_k, cache_v, scale, start, softmax_scale)
    # Writes of a custom operator leave version counters alone; autograd would miss a cache that it saved.
    torch.autograd.graph.increment_version((cache_k, cache_v))
    return out


def _readable(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the channels."""
    return x if x.stride(3) == 1 else x.contiguous()


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()
