"""Operator schemas, fake implementations and autograd of block-causal scale attention. PyTorch only.

The last argument is the name of the backend module that runs the call. The reference is plain differentiable PyTorch
and needs no operator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch

dispatch.register(__package__, "attention_forward", "attention_step")

_SCHEMAS = {
    # The second result is the logarithm of each row's sum of exponentials, [batch, heads, length] in fp32: what the
    # backward pass recomputes the weights from.
    "forward": "(Tensor q, Tensor k, Tensor v, Tensor? head_log_scale, int[] lengths, float softmax_scale, str backend)"
    " -> (Tensor, Tensor)",
    # Gradients of q, k, v and head_log_scale (fp32; without elements where there is none).
    "backward": "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? head_log_scale, Tensor out, Tensor lse, "
    "int[] lengths, float softmax_scale, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "step": "(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor? head_log_scale, int start, "
    "float softmax_scale, str backend) -> Tensor",
}

_library = torch.library.Library("aar_kernels", "FRAGMENT")


def _implementation(name: str):
    selected = "attention_step" if name == "step" else "attention_forward"

    def run(*args):
        *args, backend = args
        return getattr(dispatch.module(selected, backend), name)(*args)

    return run


for _name, _schema in _SCHEMAS.items():
    _library.define(f"attention_{_name}{_schema}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(f"attention_{_name}", _implementation(_name), "CompositeExplicitAutograd")


def _fake(name: str):
    return torch.library.register_fake(f"aar_kernels::attention_{name}", lib=_library)


@_fake("forward")
def _(q, k, v, head_log_scale, lengths, softmax_scale, backend):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


@_fake("backward")
def _(grad, q, k, v, head_log_scale, out, lse, lengths, softmax_scale, backend):
    heads = 0 if head_log_scale is None else q.shape[2]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), q.new_empty(heads, dtype=torch.float32)


@_fake("step")
def _(q, k, v, cache_k, cache_v, head_log_scale, start, softmax_scale, backend):
    return q.new_empty(q.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, head_log_scale, ctx.lengths, ctx.softmax_scale, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, head_log_scale, out, lse)


@once_differentiable
def _backward(ctx, grad, _):
    q, k, v, head_log_scale, out, lse = ctx.saved_tensors
    arguments = (grad, q, k, v, head_log_scale, out, lse, ctx.lengths, ctx.softmax_scale, ctx.backend)
    *grads, grad_scale = call("backward", *arguments)
    grad_scale = None if head_log_scale is None else grad_scale.to(head_log_scale.dtype)
    return *grads, grad_scale, None, None, None


torch.library.register_autograd("aar_kernels::attention_forward", _backward, setup_context=_setup_context, lib=_library)


def call(name: str, *args) -> Tensor | tuple[Tensor, ...]:
    """Run one operator; the backend's name is the last argument."""
    return getattr(torch.ops.aar_kernels, f"attention_{name}")(*args)
