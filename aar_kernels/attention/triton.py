"""Triton backend: a portable GPU implementation (kernels and block sizes: `triton_kernels`).

One launch forward, two backward, one or two for a cached step. Nothing is as large as ``length x length``. Keys that a
block of queries does not see are not read, and nothing waits for the device, so that every call can be captured in a
CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
import triton
from torch import Tensor

from .._triton import unavailable, wrong_device  # noqa: F401
from . import triton_kernels as kernels
from .reference import LARGEST_LOG_SCALE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

T = TypeVar("T")


def unsupported(problem) -> str | None:
    if reason := wrong_device(problem):
        return reason
    if problem.dtype not in DTYPES:
        return f"float32, bfloat16 or float16 only, got {problem.dtype}"
    if not 32 <= problem.dim <= 128:
        return f"head_dim 32 to 128 only, got {problem.dim}"
    return None


def _operator(function: Callable[..., T]) -> Callable[..., T]:
    """Launch on the device of the first tensor, and record nothing for autograd (`ops` registers the gradients)."""

    @functools.wraps(function)
    def run(first: Tensor, *args) -> T:
        with torch.no_grad(), torch.cuda.device_of(first):
            return function(first, *args)

    return run


@_operator
def forward(q, k, v, head_log_scale, lengths, softmax_scale) -> tuple[Tensor, Tensor]:
    q, softmax_scale = _positive(q, softmax_scale)
    q, k, v = map(_rows, (q, k, v))
    batch, length, heads, dim = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)
    k_norms = _inverse_norms(k, head_log_scale)
    kernels.forward_kernel[_blocks(q, "BLOCK_M")](
        out, lse, q, k, v, k_norms, head_log_scale, _ends(q, lengths), *_strides(q, k, v), length, heads, softmax_scale,
        D=dim, **_config("forward", q),
    )  # fmt: skip
    return out, lse


@_operator
def backward(grad, q, k, v, head_log_scale, out, lse, lengths, softmax_scale) -> tuple[Tensor, ...]:
    negative = softmax_scale < 0
    q, softmax_scale = _positive(q, softmax_scale)
    grad, q, k, v = map(_rows, (grad, q, k, v))
    out = out.contiguous()
    batch, length, heads, dim = q.shape
    starts, ends = _starts(q, lengths), _ends(q, lengths)
    cosine, exact = head_log_scale is not None, q.dtype == torch.float32
    deltas, k_norms = torch.empty_like(lse), _inverse_norms(k, head_log_scale)
    q_norms = torch.empty_like(lse) if cosine else None
    balances = torch.empty_like(lse) if exact else None
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    strides = _strides(grad, q, k, v)
    config = _config("query_grad", q)
    d_scale = lse.new_empty(batch, heads, triton.cdiv(length, config["BLOCK_M"])) if cosine else None
    kernels.query_grad_kernel[_blocks(q, "BLOCK_M")](
        dq, d_scale, deltas, q_norms, balances, grad, out, q, k, v, k_norms, head_log_scale, ends, lse, *strides,
        length, heads, softmax_scale, D=dim, **config,
    )  # fmt: skip
    kernels.key_grad_kernel[_blocks(q, "BLOCK_N")](
        dk, dv, grad, q, k, v, head_log_scale, starts, ends, lse, deltas, q_norms, balances, *strides,
        length, heads, softmax_scale, D=dim, **_config("key_grad", q),
    )  # fmt: skip
    if negative:
        dq.neg_()
    if not cosine:
        return dq, dk, dv, lse.new_empty(0)
    return dq, dk, dv, d_scale.sum((0, 2)).masked_fill_(head_log_scale > LARGEST_LOG_SCALE, 0)


@_operator
def step(q, k, v, cache_k, cache_v, head_log_scale, start, softmax_scale) -> Tensor:
    q, softmax_scale = _positive(q, softmax_scale)
    q, k, v = map(_rows, (q, k, v))
    batch, count, heads, dim = q.shape
    config = _config("step", q)
    config["BLOCK_M"] = min(max(16, triton.next_power_of_2(count)), config["BLOCK_M"])
    row_blocks = triton.cdiv(count, config["BLOCK_M"])
    chunk, splits = _split(start + count, config["BLOCK_N"], batch * heads * row_blocks, q.device)
    out = q.new_empty(q.shape)
    parts, lse = out, None
    if splits > 1:
        parts = q.new_empty(splits, *q.shape, dtype=torch.float32)
        lse = q.new_empty(splits, batch, count, heads, dtype=torch.float32)
    kernels.step_kernel[batch * heads, row_blocks, splits](
        parts, lse, q, k, v, cache_k, cache_v, head_log_scale, *_strides(q, k, v, cache_k, cache_v),
        start, count, heads, chunk, softmax_scale, D=dim, **config,
    )  # fmt: skip
    if splits > 1:
        rows, config = batch * count * heads, _config("rows", q)
        kernels.combine_kernel[triton.cdiv(rows, config["BLOCK_M"]),](out, parts, lse, rows, splits, D=dim, **config)
    torch.autograd.graph.increment_version((cache_k, cache_v))
    return out


def _positive(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """The kernels' running maximum takes a positive scale: the sign goes into q."""
    return (q, softmax_scale) if softmax_scale >= 0 else (-q, -softmax_scale)


def _rows(x: Tensor) -> Tensor:
    """Any strides will do for the kernels as long as the channels of a head lie side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def _inverse_norms(x: Tensor, head_log_scale: Tensor | None) -> Tensor | None:
    """``[B, H, L]``, for cosine attention."""
    if head_log_scale is None:
        return None
    batch, length, heads, dim = x.shape
    norms = x.new_empty(batch, heads, length, dtype=torch.float32)
    kernels.norm_kernel[_blocks(x, "BLOCK_M")](norms, x, *_strides(x), length, heads, D=dim, **_config("rows", x))
    return norms


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [tensor.stride()[:3] for tensor in tensors]


def _blocks(q: Tensor, block: str) -> Callable[[dict], tuple[int, ...]]:
    """A grid with one program per block of tokens of each head."""
    batch, length, heads, _ = q.shape
    return lambda meta: (batch * heads * triton.cdiv(length, meta[block]),)


def _config(kernel: str, q: Tensor) -> dict[str, int]:
    capability = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 0
    return kernels.config(kernel, capability, q.shape[3], q.element_size())


def _split(keys: int, block: int, programs: int, device: torch.device) -> tuple[int, int]:
    """How many keys one program takes, and into how many programs that splits them: enough to fill the device, where
    the ``programs`` there are without it do not."""
    blocks = triton.cdiv(keys, block)
    wanted = max(1, _processors(device) // max(programs, 1))
    chunk = triton.cdiv(blocks, wanted)
    return chunk * block, triton.cdiv(blocks, chunk)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _ends(q: Tensor, lengths: Sequence[int]) -> Tensor:
    """``[L]`` int32: where the scale of each token ends."""
    return _table(q.device, tuple(lengths), tuple(accumulate(lengths)))


def _starts(q: Tensor, lengths: Sequence[int]) -> Tensor:
    """``[L]`` int32: where the scale of each token begins."""
    return _table(q.device, tuple(lengths), (0, *accumulate(lengths[:-1])))


def _table(device: torch.device, lengths: tuple[int, ...], values: tuple[int, ...]) -> Tensor:
    """``values[s]`` for each token of scale ``s``, kept for each stream: another would have to wait for the one that
    builds it. Not kept under capture, where the memory is the graph's and filled only when it is replayed."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _build(device, lengths, values)
    return _kept(torch.cuda.current_stream(device), device, lengths, values)


def _build(device: torch.device, lengths: tuple[int, ...], values: tuple[int, ...]) -> Tensor:
    """Filled in by kernels, since a copy from the host can be neither captured nor left unwaited for."""
    table = torch.empty(sum(lengths), dtype=torch.int32, device=device)
    for part, value in zip(table.split(lengths), values, strict=True):
        part.fill_(value)
    return table


@functools.lru_cache(maxsize=256)
def _kept(stream, *arguments) -> Tensor:
    return _build(*arguments)
