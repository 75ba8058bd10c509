"""Public functions of adaptive layer normalisation: they check their input, then pick a backend.

A block of DiT, VAR or AAR is two half-blocks, each of which modulates, transforms and adds::

    h = layer_norm_modulate(x, scale1, shift1)
    x, h = gated_residual_modulate(x, attention(h), gate1, scale2, shift2)
    x, h = gated_residual_modulate(x, mlp(h), gate2, next_scale1, next_shift1)  # of the next block

``x, y`` are ``[B, L, C]``; ``gate, scale, shift`` are ``[B, C]`` or ``[B, 1, C]``, and best are slices of one
projection of the condition (``projection(c).chunk(6, dim=-1)``), which are read where they lie.

``x``, the residual stream, is fp32, bf16, fp16 or (reference) fp64; each other tensor has x's dtype, or fp32, bf16 or
fp16. All arithmetic is in fp32 (fp64 where x is). The new residual has x's dtype. What was modulated has ``dtype``: x's
unless given, or autocast's under autocast (unless x is fp64), so that the linear layer that reads it casts nothing.

Differentiable, once, by every tensor. Gradients of ``gate, scale, shift`` are sums over L in fp32, in an order that
does not depend on the number of threads. Kept for the backward pass: the normalised x, two numbers for each of its
rows, y, gate and scale. Where B or L is 0 the results are empty, and the gradients of gate, scale and shift are zero.

Raises, on every backend alike:
    ValueError: shapes, dtypes or devices that do not fit.
    BackendError: a forced backend that cannot run the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from . import ops, reference

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``LayerNorm(x) * (1 + scale) + shift``: ``[B, L, C]``. The norm has no affine parameters of its own."""
    return _run(x, None, None, scale, shift, eps, dtype, backend)[1]


def gated_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6,
    dtype: torch.dtype | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``x + gate * y``, and the `layer_norm_modulate` of that by ``scale, shift``, in one pass over memory.

    Returns:
        The new residual stream and its modulation, each ``[B, L, C]``.
    """
    return _run(x, y, gate, scale, shift, eps, dtype, backend)


def _run(
    x, y, gate, scale, shift, eps: float, dtype: torch.dtype | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    if x.dim() != 3 or x.shape[2] == 0 or x.dtype not in (*_NARROW, torch.float64):
        raise ValueError(f"x must be fp32, bf16, fp16 or fp64 [B, L, C >= 1], got {x.dtype} {list(x.shape)}")
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y must be {list(x.shape)} as x, got {list(y.shape)}")
    gate, scale, shift = _per_item(x, "gate", gate), _per_item(x, "scale", scale), _per_item(x, "shift", shift)
    for name, tensor in (("y", y), ("gate", gate), ("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.dtype not in (x.dtype, *_NARROW):
            raise ValueError(f"{name} must be {x.dtype} as x, or fp32, bf16 or fp16, got {tensor.dtype}")
    if dtype not in (None, x.dtype, *_NARROW):
        raise ValueError(f"dtype must be {x.dtype} as x, or fp32, bf16 or fp16, got {dtype}")
    dtype = dtype or _modulated_dtype(x)
    tensors = (x, y, gate, scale, shift)
    grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    name = dispatch.select("modulation_forward", *tensors, backend=backend, needs_grad=grad, dim=x.shape[2])
    if name == "reference":
        return reference.forward(*tensors, eps, dtype)
    return ops.call("forward", *tensors, eps, dtype, name)[:2]


def _per_item(x: Tensor, name: str, tensor: Tensor | None) -> Tensor | None:
    """``[B, C]`` of a tensor that has one row for each item of ``x``."""
    if tensor is None:
        return None
    batch, _, channels = x.shape
    if tensor.shape not in ((batch, channels), (batch, 1, channels)):
        wanted = f"[{batch}, {channels}] or [{batch}, 1, {channels}]"
        raise ValueError(f"{name} must be {wanted}, got {list(tensor.shape)}")
    return tensor if tensor.dim() == 2 else tensor.squeeze(1)


def _modulated_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
