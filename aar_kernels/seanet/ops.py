"""Operator schemas, fake implementations and autograd of SEANet. PyTorch only; `seanet_layer` alone is differentiable.

The last argument is the name of the backend module that runs the call. The reference of `seanet_layer` is plain
differentiable PyTorch and needs no operator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch
from .layers import split_fields

dispatch.register(__package__, "seanet_stack", "seanet_stack_chunk", "seanet_lstm", "seanet_norm_", "seanet_layer")

# x is [B, T, C] in fp32 (fp16: triton and reference; fp64: reference). The rest are the parts of a PackedStack or
# PackedLSTM, of x's dtype or bf16.
_WEIGHTED = "(Tensor x, Tensor weights"
_SCHEMAS = {
    "seanet_stack": f"{_WEIGHTED}, int[] layers, int block, str backend) -> Tensor",
    "seanet_stack_chunk": (
        f"{_WEIGHTED}, int[] layers, Tensor(a!) state, SymInt position, bool last, int block, str backend) -> Tensor"
    ),
    "seanet_layer": f"{_WEIGHTED}, int[] layer, str backend) -> Tensor",
    # Gradients of x (without elements if it needs none) and of weights.
    "seanet_layer_backward": (
        f"{_WEIGHTED}, int[] layer, Tensor grad, bool needs_x, str backend) -> (Tensor, Tensor)"
    ),
    "seanet_lstm": f"{_WEIGHTED}, int channels, bool skip, Tensor? state, str backend) -> (Tensor, Tensor)",
    "seanet_norm_": "(Tensor(a!) x, Tensor scale, Tensor shift, float eps, Tensor? add, str backend) -> ()",
}

_library = torch.library.Library("aar_kernels", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(f"{_name}{_schema}", tags=torch.Tag.pt2_compliant_tag)


def _stack(*args):
    *args, backend = args
    return dispatch.module("seanet_stack", backend).stack(*args)


def _stack_chunk(*args):
    *args, backend = args
    return dispatch.module("seanet_stack_chunk", backend).stack_chunk(*args)


def _layer(*args):
    *args, backend = args
    return dispatch.module("seanet_layer", backend).layer(*args)


def _layer_backward(*args):
    *args, backend = args
    return dispatch.module("seanet_layer", backend).layer_backward(*args)


def _lstm(*args):
    *args, backend = args
    return dispatch.module("seanet_lstm", backend).lstm(*args)


def _norm_(*args):
    *args, backend = args
    dispatch.module("seanet_norm_", backend).norm_(*args)


_library.impl("seanet_stack", _stack, "CompositeExplicitAutograd")
_library.impl("seanet_stack_chunk", _stack_chunk, "CompositeExplicitAutograd")
_library.impl("seanet_layer", _layer, "CompositeExplicitAutograd")
_library.impl("seanet_layer_backward", _layer_backward, "CompositeExplicitAutograd")
_library.impl("seanet_lstm", _lstm, "CompositeExplicitAutograd")
_library.impl("seanet_norm_", _norm_, "CompositeExplicitAutograd")


@torch.library.register_fake("aar_kernels::seanet_stack", lib=_library)
def _fake_stack(x, weights, layers, block, backend):
    length, fields = x.shape[1], split_fields(layers)
    for layer in fields:
        length = layer.length(length)
    return x.new_empty(x.shape[0], length, fields[-1].outputs)


@torch.library.register_fake("aar_kernels::seanet_stack_chunk", lib=_library)
def _(x, weights, layers, state, position, last, block, backend):
    return _fake_stack(x, weights, layers, block, backend)  # strides are whole before, so that the end is as a signal's


@torch.library.register_fake("aar_kernels::seanet_layer", lib=_library)
def _(x, weights, layer, backend):
    return _fake_stack(x, weights, layer, 0, backend)


@torch.library.register_fake("aar_kernels::seanet_layer_backward", lib=_library)
def _(x, weights, layer, grad, needs_x, backend):
    return x.new_empty(x.shape if needs_x else 0), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output):
    x, weights, ctx.layer, ctx.backend = inputs
    ctx.save_for_backward(x, weights)


@once_differentiable
def _backward(ctx, grad):
    x, weights = ctx.saved_tensors
    arguments = (ctx.layer, grad, ctx.needs_input_grad[0], ctx.backend)
    grad_x, grad_weights = torch.ops.aar_kernels.seanet_layer_backward(x, weights, *arguments)
    return grad_x if ctx.needs_input_grad[0] else None, grad_weights, None, None


torch.library.register_autograd(
    "aar_kernels::seanet_layer", _backward, setup_context=_setup_context, lib=_library
)


@torch.library.register_fake("aar_kernels::seanet_lstm", lib=_library)
def _(x, weights, channels, skip, state, backend):
    return x.new_empty(x.shape), x.new_empty(weights.shape[0], 2, x.shape[0], channels)


@torch.library.register_fake("aar_kernels::seanet_norm_", lib=_library)
def _(x, scale, shift, eps, add, backend):
    pass


def stack(*args) -> Tensor:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.seanet_stack(*args)


def layer(*args) -> Tensor:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.seanet_layer(*args)


def stack_chunk(*args) -> Tensor:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.seanet_stack_chunk(*args)


def lstm(*args) -> tuple[Tensor, Tensor]:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.seanet_lstm(*args)


def norm_(*args) -> None:
    """Run the operator; the backend's name is the last argument."""
    torch.ops.aar_kernels.seanet_norm_(*args)
