"""Operator schemas, fake implementations and autograd of multi-scale residual quantization. PyTorch only.

The first arguments after the data are `Levels.arguments()`, or those of `ProjectedLevels`; the last is the name of the
backend module that runs the call (`native`, `triton`). The reference is plain differentiable PyTorch and needs no
operator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch

OPERATORS = (
    "encode", "decode", "decode_scales", "next_scale_inputs", "step", "quantize", "update", "encode_projected",
    "decode_projected",
)  # fmt: skip
dispatch.register(__package__, *(f"msrq_{name}" for name in OPERATORS))

_LEVELS = (
    "Tensor codebooks, Tensor[] phi_weights, Tensor[] phi_biases, int[] lengths, int[] phi_index, str metric, "
    "int[] widths"
)
_PROJECTED = (
    "Tensor codebooks, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out, int[] strides, str metric"
)
_SCHEMAS = {
    "encode": f"(Tensor x, Tensor? mask, {_LEVELS}, str backend) -> Tensor",
    "decode": f"(Tensor codes, {_LEVELS}, int length, str backend) -> Tensor",
    "decode_scales": f"(Tensor codes, {_LEVELS}, int length, str backend) -> Tensor",
    "next_scale_inputs": f"(Tensor codes, {_LEVELS}, int length, str backend) -> Tensor",
    "step": f"(Tensor f_hat, Tensor codes, {_LEVELS}, int scale, str backend) -> (Tensor, Tensor)",
    # Besides the reference's four results: the sum over scales of the residual after each scale [B, T, D], and the
    # gradients of the loss by phi, [P, D, D, k_max] and [P, D]. The loss is quadratic and its gradients need nothing
    # that the forward pass has not at hand, so computing them there saves keeping S residuals for the backward pass.
    "quantize": f"(Tensor x, Tensor? mask, {_LEVELS}, Tensor? samples, bool per_scale, bool want_statistics, "
    "bool want_phi_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "update": "(Tensor(a!) codebooks, Tensor(b!) cluster_size, Tensor(c!) embed_avg, Tensor statistics, float decay, "
    "float epsilon, float dead_code_threshold, str backend) -> ()",
    "encode_projected": f"(Tensor x, {_PROJECTED}, str backend) -> (Tensor, Tensor)",
    "decode_projected": f"(Tensor codes, {_PROJECTED}, int length, str backend) -> Tensor",
}

_library = torch.library.Library("aar_kernels", "FRAGMENT")


def _implementation(name: str):
    def run(*args):
        *args, backend = args
        return getattr(dispatch.module(f"msrq_{name}", backend), name)(*args)

    return run


for _name, _schema in _SCHEMAS.items():
    _library.define(f"msrq_{_name}{_schema}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(f"msrq_{_name}", _implementation(_name), "CompositeExplicitAutograd")


def _fake(name: str):
    return torch.library.register_fake(f"aar_kernels::msrq_{name}", lib=_library)


@_fake("encode")
def _(x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, backend):
    return x.new_empty(x.shape[0], sum(lengths), dtype=torch.int64)


@_fake("decode")
def _(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length, backend):
    return codebooks.new_empty(codes.shape[0], length, codebooks.shape[2])


@_fake("decode_scales")
def _(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length, backend):
    return codebooks.new_empty(len(lengths), codes.shape[0], length, codebooks.shape[2])


@_fake("next_scale_inputs")
def _(codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, length, backend):
    return codebooks.new_empty(codes.shape[0], sum(lengths[1:]), codebooks.shape[2])


@_fake("step")
def _(f_hat, codes, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, scale, backend):
    rows = lengths[scale + 1] if scale + 1 < len(lengths) else 0
    return f_hat.new_empty(f_hat.shape), f_hat.new_empty(f_hat.shape[0], rows, f_hat.shape[2])


@_fake("quantize")
def _(x, mask, codebooks, phi_weights, phi_biases, lengths, phi_index, metric, widths, samples, per_scale,
      want_statistics, want_phi_grad, backend):  # fmt: skip
    books, size, dim = codebooks.shape
    numbers = books * size * (1 + dim * (1 if samples is None else 2)) if want_statistics else 0
    kernels = len(phi_weights) if want_phi_grad else 0
    width = max((weight.shape[-1] for weight in phi_weights), default=0)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], sum(lengths), dtype=torch.int64),
        x.new_empty(()),
        x.new_empty(numbers),
        x.new_empty(x.shape),
        x.new_empty(kernels, dim, dim, width),
        x.new_empty(kernels, dim),
    )


@_fake("update")
def _(codebooks, cluster_size, embed_avg, statistics, decay, epsilon, dead_code_threshold, backend):
    return None


@_fake("encode_projected")
def _(x, codebooks, weight_in, bias_in, weight_out, bias_out, strides, metric, backend):
    batch, _, length = x.shape
    codes = x.new_empty(batch, sum(length // stride for stride in strides), dtype=torch.int64)
    return codes, x.new_empty(batch, len(strides) * codebooks.shape[2], length)


@_fake("decode_projected")
def _(codes, codebooks, weight_in, bias_in, weight_out, bias_out, strides, metric, length, backend):
    return codebooks.new_empty(codes.shape[0], weight_out.shape[1], length)


def _setup_context(ctx, inputs, output):
    x, mask, codebooks, phi_weights, _, lengths, _, _, _, _, per_scale, *_ = inputs
    quantized, codes, _, statistics, residual_sum, weight_grad, bias_grad = output
    ctx.mark_non_differentiable(codes, statistics, residual_sum, weight_grad, bias_grad)
    ctx.set_materialize_grads(False)  # else every pass backward would fill zeros as large as the statistics
    ctx.save_for_backward(residual_sum, weight_grad, bias_grad, mask)
    ctx.widths = [weight.shape[-1] for weight in phi_weights]
    ctx.scales, ctx.multiplicity = len(lengths), len(lengths) if per_scale else 1


@once_differentiable
def _backward(ctx, grad_quantized, _codes, grad_loss, *_):
    residual_sum, weight_grad, bias_grad, mask = ctx.saved_tensors
    grad_x = None
    if grad_quantized is not None:
        grad = grad_quantized if mask is None else grad_quantized.masked_fill(~mask[..., None], 0)
        grad_x = ctx.multiplicity * grad
    if grad_loss is not None:
        rows = residual_sum.shape[0] * residual_sum.shape[1] if mask is None else mask.sum()
        scale = 2 * grad_loss / (ctx.scales * residual_sum.shape[-1]) / (rows + (rows == 0))
        grad_x = scale * residual_sum if grad_x is None else torch.addcmul(grad_x, scale, residual_sum)
    weights, biases = [None] * len(ctx.widths), [None] * len(ctx.widths)
    if weight_grad.shape[0] and grad_loss is not None:
        biases = list((grad_loss * bias_grad).unbind(0))
        for k, width in enumerate(ctx.widths):
            margin = (weight_grad.shape[-1] - width) // 2
            weights[k] = grad_loss * weight_grad[k, :, :, margin : margin + width]
    # An empty list of numbers looks like a list of no tensors, which has a list of no gradients.
    return grad_x, None, None, weights, biases, None, None if ctx.widths else [], None, [], *[None] * 5


torch.library.register_autograd("aar_kernels::msrq_quantize", _backward, setup_context=_setup_context, lib=_library)


def call(name: str, *args) -> Tensor | tuple[Tensor, ...]:
    """Run one operator; the backend's name is the last argument."""
    return getattr(torch.ops.aar_kernels, f"msrq_{name}")(*args)
