"""Operator schemas, fake implementations and autograd of adaptive layer normalisation. PyTorch only.

One schema serves both public functions: without ``y`` and ``gate`` there is no residual to add. The last argument is
the name of the backend module that runs the call. The reference is plain differentiable PyTorch and needs no operator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch

dispatch.register(__package__, "modulation_forward")

_SCHEMAS = {
    # x + gate * y in x's dtype (without elements where there is no y), its modulation in `dtype`, and the mean and
    # reciprocal standard deviation of each row, [B, L, 2] in fp32.
    "forward": "(Tensor x, Tensor? y, Tensor? gate, Tensor scale, Tensor shift, float eps, ScalarType dtype, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    # From the x that was normalised: gradients of x, of y (without elements where there is none), and of scale, shift
    # and gate: [2, B, C] or, with a gate, [3, B, C] in fp32.
    "backward": "(Tensor? grad_x, Tensor grad_modulated, Tensor x, Tensor? y, Tensor? gate, Tensor scale, "
    "Tensor statistics, str backend) -> (Tensor, Tensor, Tensor)",
}

_library = torch.library.Library("aar_kernels", "FRAGMENT")


def _implementation(name: str):
    def run(*args):
        *args, backend = args
        return getattr(dispatch.module("modulation_forward", backend), name)(*args)

    return run


for _name, _schema in _SCHEMAS.items():
    _library.define(f"modulation_{_name}{_schema}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(f"modulation_{_name}", _implementation(_name), "CompositeExplicitAutograd")


def _fake(name: str):
    return torch.library.register_fake(f"aar_kernels::modulation_{name}", lib=_library)


@_fake("forward")
def _(x, y, gate, scale, shift, eps, dtype, backend):
    return (
        x.new_empty(x.shape if y is not None else 0),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(*x.shape[:2], 2, dtype=torch.float32),
    )


@_fake("backward")
def _(grad_x, grad_modulated, x, y, gate, scale, statistics, backend):
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if y is None else y.new_empty(y.shape),
        x.new_empty(2 if y is None else 3, *scale.shape, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    x, y, gate, scale, shift, _, _, ctx.backend = inputs
    x_new, _, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([statistics] if y is not None else [x_new, statistics]))
    ctx.save_for_backward(x_new if y is not None else x, y, gate, scale, statistics)
    ctx.shift_dtype, ctx.modulated_dtype = shift.dtype, output[1].dtype


@once_differentiable
def _backward(ctx, grad_x, grad_modulated, _):
    x, y, gate, scale, statistics = ctx.saved_tensors
    if grad_modulated is None:
        grad_modulated = torch.zeros_like(x, dtype=ctx.modulated_dtype)
    grad_x, grad_y, sums = call("backward", grad_x, grad_modulated, x, y, gate, scale, statistics, ctx.backend)
    grad_scale, grad_shift = sums[0].to(scale.dtype), sums[1].to(ctx.shift_dtype)
    if y is None:
        return grad_x, None, None, grad_scale, grad_shift, None, None, None
    return grad_x, grad_y, sums[2].to(gate.dtype), grad_scale, grad_shift, None, None, None


torch.library.register_autograd(
    "aar_kernels::modulation_forward", _backward, setup_context=_setup_context, lib=_library
)


def call(name: str, *args) -> tuple[Tensor, ...]:
    """Run one operator; the backend's name is the last argument."""
    return getattr(torch.ops.aar_kernels, f"modulation_{name}")(*args)
