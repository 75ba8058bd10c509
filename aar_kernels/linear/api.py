"""The public function of linear layers with packed weights: it checks its input, then picks a backend.

Raises, on every backend alike:
    ValueError: shapes, dtypes or devices that do not fit, or gradients asked for.
    BackendError: a forced backend that cannot run the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from . import ops
from .weight import DTYPES, PackedWeight

ACTIVATIONS = (None, "gelu_tanh")


def linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, activation: str | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``activation(x @ W.T + bias)`` with a weight packed by `pack`. For inference: it has no gradient.

    All arithmetic is fp32 on the numbers that the packed weight stands for; activations are not quantised. On the
    native backend a row's result depends neither on the other rows nor on the number of threads; on Triton the order of
    sums depends on how many rows there are.

    Args:
        x: ``[..., K]`` fp32, bf16 or fp16 (fp64: reference).
        packed: a weight ``[N, K]`` on x's device.
        bias: ``[N]`` floating point.
        activation: None or ``"gelu_tanh"``, ``F.gelu(approximate="tanh")``.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    _check(x, packed, bias, activation)
    # Each call below that can be spared is spared: with one row, a small layer takes as long as a dozen of them.
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    needs = ("fp8",) if packed.dtype == torch.float8_e4m3fn else ()
    name = dispatch.select("linear_forward", rows, packed.data, packed.scale, bias, backend=backend, needs=needs)
    out = ops.call(rows, packed.data, packed.scale, bias, packed.N, activation == "gelu_tanh", name)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], packed.N)


def _check(x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be None or "gelu_tanh", got {activation!r}')
    if packed.dtype not in DTYPES:
        raise ValueError(f"a packed weight holds fp32, bf16, int8 or fp8, got {packed.dtype}")
    if x.dim() < 1 or x.shape[-1] != packed.K or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point [..., {packed.K}], got {x.dtype} {list(x.shape)}")
    if bias is not None and (bias.shape != (packed.N,) or not bias.dtype.is_floating_point):
        raise ValueError(f"bias must be floating point [{packed.N}], got {bias.dtype} {list(bias.shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("linear with a packed weight is not differentiable; call it under torch.no_grad()")
