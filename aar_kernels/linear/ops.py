"""Operator schema and fake implementation of linear layers with packed weights. PyTorch only; not differentiable.

The last argument is the name of the backend module that runs the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch

dispatch.register(__package__, "linear_forward")

# x is [M, K] in fp32, bf16, fp16 (fp64: reference), and the result in its dtype. data, scale and N are those of a
# PackedWeight, bias is [N] in any floating dtype.
_SCHEMA = "(Tensor x, Tensor data, Tensor? scale, Tensor? bias, SymInt N, bool gelu, str backend) -> Tensor"

_library = torch.library.Library("aar_kernels", "FRAGMENT")
_library.define(f"linear_forward{_SCHEMA}", tags=torch.Tag.pt2_compliant_tag)


def _run(*args):
    *args, backend = args
    return dispatch.module("linear_forward", backend).forward(*args)


_library.impl("linear_forward", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("aar_kernels::linear_forward", lib=_library)
def _(x, data, scale, bias, N, gelu, backend):
    return x.new_empty(x.shape[0], N)


def call(*args) -> Tensor:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.linear_forward(*args)
