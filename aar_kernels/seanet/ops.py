"""Operator schemas and fake implementations of SEANet. PyTorch only; not differentiable.

The last argument is the name of the backend module that runs the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .layers import split_fields

dispatch.register(__package__, "seanet_stack", "seanet_stack_chunk", "seanet_lstm", "seanet_norm_")

# x is [B, T, C] in fp32 (fp16: triton and reference; fp64: reference). The rest are the parts of a PackedStack or
# PackedLSTM, of x's dtype or bf16.
_WEIGHTED = "(Tensor x, Tensor weights"
_SCHEMAS = {
    "seanet_stack": f"{_WEIGHTED}, int[] layers, int block, str backend) -> Tensor",
    "seanet_stack_chunk": (
        f"{_WEIGHTED}, int[] layers, Tensor(a!) state, SymInt position, bool last, int block, str backend) -> Tensor"
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


def _lstm(*args):
    *args, backend = args
    return dispatch.module("seanet_lstm", backend).lstm(*args)


def _norm_(*args):
    *args, backend = args
    dispatch.module("seanet_norm_", backend).norm_(*args)


_library.impl("seanet_stack", _stack, "CompositeExplicitAutograd")
_library.impl("seanet_stack_chunk", _stack_chunk, "CompositeExplicitAutograd")
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


@torch.library.register_fake("aar_kernels::seanet_lstm", lib=_library)
def _(x, weights, channels, skip, state, backend):
    return x.new_empty(x.shape), x.new_empty(weights.shape[0], 2, x.shape[0], channels)


@torch.library.register_fake("aar_kernels::seanet_norm_", lib=_library)
def _(x, scale, shift, eps, add, backend):
    pass


def stack(*args) -> Tensor:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.seanet_stack(*args)


def stack_chunk(*args) -> Tensor:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.seanet_stack_chunk(*args)


def lstm(*args) -> tuple[Tensor, Tensor]:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.seanet_lstm(*args)


def norm_(*args) -> None:
    """Run the operator; the backend's name is the last argument."""
    torch.ops.aar_kernels.seanet_norm_(*args)
