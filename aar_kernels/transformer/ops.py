"""Operator schema and fake implementation of a transformer's blocks at inference. PyTorch only; not differentiable.

The last argument is the name of the backend module that runs the call. The reference needs no operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch

dispatch.register(__package__, "transformer_step")

# Of each block four weights, scales where these are int8, and biases; a log scale or none; keys and values.
_SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases, Tensor[] head_log_scales, Tensor[] modulations, "
    "Tensor(a!)[] caches, int start, int heads, float softmax_scale, float eps, str backend) -> Tensor"
)

_library = torch.library.Library("aar_kernels", "FRAGMENT")
_library.define(f"transformer_step{_SCHEMA}", tags=torch.Tag.pt2_compliant_tag)


def _run(*args) -> Tensor:
    *args, backend = args
    return dispatch.module("transformer_step", backend).step(*args)


_library.impl("transformer_step", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("aar_kernels::transformer_step", lib=_library)
def _(x, weights, scales, biases, head_log_scales, modulations, caches, start, heads, softmax_scale, eps, backend):
    return x.new_empty(x.shape)


def call(*args) -> Tensor:
    """Run the operator; the backend's name is the last argument."""
    return torch.ops.aar_kernels.transformer_step(*args)
