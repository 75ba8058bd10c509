"""Public functions of block-causal scale attention: they check their input, then pick a backend.

Raises, on every backend alike:
    ValueError: shapes, dtypes or devices that do not fit.
    BackendError: a forced backend that cannot run the call.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .. import dispatch
from ..schedule import ScaleSchedule
from . import ops, reference
from .cache import ScaleCache


def scale_attention(
    q: Tensor, k: Tensor, v: Tensor, schedule: ScaleSchedule, *, softmax_scale: float | None = None,
    head_log_scale: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Attention in which each token sees its own scale and all earlier ones (arXiv 2408.09027, section 3.2).

    No ``length x length`` tensor is made outside the reference. Products accumulate in fp32, also for bf16 and fp16.
    Differentiable by q, k, v and head_log_scale. A NaN or an Inf in q or k stays in the rows that see it; so it does in
    v on the native backend, while elsewhere 0 * NaN may spread it over the head.

    Args:
        q, k, v: ``[batch, length, heads, head_dim]``, fp32, bf16 or fp16 (fp64: reference), head_dim 32 to 128 on the
            fast backends. ``length`` may be less than ``schedule.total``: the tokens are then the first of it.
        schedule: how many tokens each scale has.
        softmax_scale: factor of the logits; ``1 / sqrt(head_dim)`` unless given, 1 for cosine attention.
        head_log_scale: ``[heads]``, fp32 or q's dtype. Makes it cosine attention: q and k are L2-normalised, and each
            head's logits are multiplied by ``exp(min(s, ln 100))``.

    Returns:
        ``[batch, length, heads, head_dim]`` in q's dtype.
    """
    _check(q, k, v, head_log_scale)
    length = q.shape[1]
    if not 1 <= length <= schedule.total:
        raise ValueError(f"q has {length} tokens, the schedule 1 to {schedule.total}")
    ends = [min(end, length) for end in schedule.offsets]
    lengths = [end - start for start, end in pairwise(ends) if end > start]
    arguments = (q, k, v, head_log_scale, lengths, _softmax_scale(q, softmax_scale, head_log_scale))
    tensors = (q, k, v, head_log_scale)
    grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    name = dispatch.select("attention_forward", *tensors, backend=backend, needs_grad=grad, dim=q.shape[3])
    if name == "reference":
        return reference.forward(*arguments)
    return ops.call("forward", *arguments, name)[0]


def scale_attention_step(
    q: Tensor, k: Tensor, v: Tensor, cache: ScaleCache, *, softmax_scale: float | None = None,
    head_log_scale: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the next tokens (one scale) to all that the cache holds and to each other; adds them to the cache.

    Equals `scale_attention` taken one scale at a time. Nothing is concatenated or moved. Not differentiable.

    Args:
        q, k, v: ``[batch, n, heads, head_dim]`` in the cache's dtype: the tokens of one scale.
        cache: holds the earlier scales; afterwards this one too.

    Returns:
        ``[batch, n, heads, head_dim]``.

    Raises:
        ValueError: also where the cache has no room left, or gradients are asked for.
    """
    _check(q, k, v, head_log_scale)
    tensors = (q, k, v, cache.k, cache.v, head_log_scale)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("the cached step is not differentiable; call it under torch.no_grad()")
    batch, room, heads, head_dim = cache.k.shape
    if (q.shape[0], *q.shape[2:]) != (batch, heads, head_dim) or q.dtype != cache.k.dtype:
        wanted = f"{cache.k.dtype} [{batch}, n, {heads}, {head_dim}]"
        raise ValueError(f"q must be {wanted} as the cache, got {q.dtype} {list(q.shape)}")
    if head_dim > 1 and (cache.k.stride(3), cache.v.stride(3)) != (1, 1):
        raise ValueError("the cache's channels must be contiguous, since it is written in place")
    if cache.length + q.shape[1] > room:
        raise ValueError(f"{q.shape[1]} more tokens do not fit: the cache holds {cache.length} of {room}")
    scale = _softmax_scale(q, softmax_scale, head_log_scale)
    arguments = (q, k, v, cache.k, cache.v, head_log_scale, cache.length, scale)
    name = dispatch.select("attention_step", *tensors, backend=backend, dim=head_dim)
    out = reference.step(*arguments) if name == "reference" else ops.call("step", *arguments, name)
    cache.length += q.shape[1]
    return out


def _softmax_scale(q: Tensor, given: float | None, head_log_scale: Tensor | None) -> float:
    if given is not None:
        return float(given)
    return 1.0 if head_log_scale is not None else 1 / math.sqrt(q.shape[3])


def _check(q: Tensor, k: Tensor, v: Tensor, head_log_scale: Tensor | None) -> None:
    if q.dim() != 4 or 0 in q.shape[1:] or not q.dtype.is_floating_point:
        raise ValueError(f"q must be floating point [batch, length, heads, head_dim], got {q.dtype} {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            raise ValueError(f"{name} must be as q, {q.dtype} {list(q.shape)}; got {tensor.dtype} {list(tensor.shape)}")
    if head_log_scale is not None:
        right = head_log_scale.shape == (q.shape[2],) and head_log_scale.dtype in (torch.float32, q.dtype)
        if not right:
            got = f"{head_log_scale.dtype} {list(head_log_scale.shape)}"
            raise ValueError(f"head_log_scale must be fp32 or {q.dtype} [{q.shape[2]}], got {got}")
