"""flash-attn backend of the cached step, where that library is installed: no mask is needed there.

flash-attn 2 (``flash_attn_with_kvcache``, which splits the keys where queries are few) or, without it, flash-attn 4
(``flash_attn.cute``). It knows neither cosine attention nor scales of heads, so PyTorch applies both before;
and so the factor of the logits, which may be negative, and which the library takes for positive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import LARGEST_LOG_SCALE


@functools.cache
def _library() -> Callable[[Tensor, Tensor, Tensor], Tensor] | str:
    """Attention of ``q`` to ``k`` and ``v``, or why there is none."""
    try:
        from flash_attn import flash_attn_with_kvcache

        return lambda q, k, v: flash_attn_with_kvcache(q, k, v, softmax_scale=1.0)
    except Exception as first:  # a build for another torch fails with whatever its loader raises
        try:
            from flash_attn.cute import flash_attn_func
        except Exception as second:
            return f"flash-attn cannot be imported: {first}; flash_attn.cute: {second}"
        return lambda q, k, v: flash_attn_func(q, k, v, softmax_scale=1.0)[0]  # [1]: logarithms of the sums


def unavailable() -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0"
    library = _library()
    return library if isinstance(library, str) else None


def unsupported(problem) -> str | None:
    if problem.device != "cuda":
        return "runs on CUDA"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 or float16 only, got {problem.dtype}"
    if problem.dim % 8 or not 32 <= problem.dim <= 128:
        return f"head_dim 32 to 128 in multiples of 8 only, got {problem.dim}"
    return None


def step(q, k, v, cache_k, cache_v, head_log_scale, start, softmax_scale) -> Tensor:
    end = start + q.shape[1]
    with torch.no_grad():
        if head_log_scale is None:
            scaled = q * softmax_scale
        else:
            gain = head_log_scale.float().clamp(max=LARGEST_LOG_SCALE).exp() * softmax_scale
            scaled = F.normalize(q.float(), dim=-1) * gain[:, None]
            k = F.normalize(k.float(), dim=-1)
        cache_k[:, start:end] = k
        cache_v[:, start:end] = v
        return _library()(scaled.to(q.dtype), cache_k[:, :end], cache_v[:, :end])
