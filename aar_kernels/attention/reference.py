"""Block-causal scale attention in plain PyTorch: the definition that every backend is held to.

Tensors are ``[batch, length, heads, head_dim]``. Differentiable by autograd, and in any floating dtype.
Source: arXiv 2408.09027, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_LOG_SCALE = math.log(100.0)


def unavailable() -> str | None:
    return None


def unsupported(problem) -> str | None:
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, head_log_scale: Tensor | None, lengths: Sequence[int], softmax_scale: float
) -> Tensor:
    """Attention in which a token sees its own scale and all earlier ones; scale ``s`` has ``lengths[s]`` tokens."""
    scale = torch.repeat_interleave(torch.tensor(lengths, device=q.device), output_size=q.shape[1])
    mask = scale[:, None] >= scale[None, :]
    if head_log_scale is not None:
        k = F.normalize(k, dim=-1)
    return _attend(_queries(q, head_log_scale, softmax_scale), k, v, mask)


def step(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, head_log_scale: Tensor | None, start: int,
    softmax_scale: float,
) -> Tensor:  # fmt: skip
    """Attention of one scale to everything before it and to itself, writing its keys and values into the caches.

    The cache holds keys as they enter the product: normalised where attention is cosine.
    """
    end = start + q.shape[1]
    cache_k[:, start:end] = k if head_log_scale is None else F.normalize(k, dim=-1)
    cache_v[:, start:end] = v
    return _attend(_queries(q, head_log_scale, softmax_scale), cache_k[:, :end], cache_v[:, :end], None)


def _queries(q: Tensor, head_log_scale: Tensor | None, softmax_scale: float) -> Tensor:
    """Queries with every factor of the logits: ``normalize(q) * exp(min(s, ln 100))`` for each head if cosine."""
    if head_log_scale is None:
        return q * softmax_scale
    scale = head_log_scale.clamp(max=LARGEST_LOG_SCALE).exp().to(q.dtype)
    return F.normalize(q, dim=-1) * (scale * softmax_scale)[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=-1), v)
