"""The public functions of SEANet: they check their input, then pick a backend.

Raise, on every backend alike:
    ValueError: shapes, dtypes or devices that do not fit, or gradients asked for where there are none.
    BackendError: a forced backend that cannot run the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from . import ops, reference
from .layers import SNAKE, SYMMETRIC, Fields, Layer, PackedLSTM, PackedStack, describe_all


def stack(x: Tensor, packed: PackedStack, *, block: int = 0, backend: str | None = None) -> Tensor:
    """Convolution layers in turn, for inference: they have no gradient.

    The native backend computes a layer block by block, and gives each block to the next layer while it is in the
    cache; the memory it takes does not grow with T. Results depend neither on the block, nor on the other items, nor
    on the number of threads.

    Args:
        x: ``[B, in, T]``, T at least 1, in the dtype of the weights, or fp32 where these are bf16: all arithmetic is
            fp32 then, on the numbers that they stand for.
        packed: layers packed by `pack`.
        block: steps of output in a block of each layer; 0 lets the backend choose.

    Returns:
        ``[B, out, T']``, channels last in memory.
    """
    _check(x, packed.weights, packed.layers[1])
    if block < 0:
        raise ValueError(f"block must not be negative, got {block}")
    length = x.shape[2]
    for fields in packed.fields:
        if (length := fields.length(length)) < 1:
            raise ValueError(f"{x.shape[2]} steps are fewer than a layer reads")
    name = dispatch.select("seanet_stack", x, packed.weights, backend=backend)
    return ops.stack(x.transpose(1, 2), packed.weights, packed.layers, block, name).transpose(1, 2)


def convolve(x: Tensor, layers: Sequence[Layer], *, backend: str | None = None) -> Tensor:
    """Convolution layers in turn, for training: differentiable, once, by x and by each weight.

    Each layer is one operator, which keeps its input alone for the backward pass: ELU, padding and what is inside of a
    residual block are computed again. Weights are packed at each call. Gradients do not depend on the number of
    threads.

    Args:
        x: ``[B, in, T]``, T at least 1, in the dtype of the weights.
        layers: without norms over time.

    Returns:
        ``[B, out, T']``, channels last in memory.
    """
    if not layers:
        raise ValueError("a stack needs a layer")
    for fields, weights in describe_all(layers):
        if x.dim() != 3 or x.shape[1] != fields.inputs or x.shape[2] < 1 or x.dtype != weights.dtype:
            wanted = f"{weights.dtype} [B, {fields.inputs}, T] with T at least 1"
            raise ValueError(f"x must be {wanted}, got {x.dtype} {list(x.shape)}")
        needs = _needs_for_training(fields)
        name = dispatch.select("seanet_layer", x, weights, backend=backend, needs=needs)
        arguments = (x.mT, weights, list(fields.numbers))
        x = (reference.layer(*arguments) if name == "reference" else ops.layer(*arguments, name)).mT
    return x


def stack_chunk(
    x: Tensor, packed: PackedStack, state: Tensor, position: int, *, last: bool = False, block: int = 0,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`stack` of causal layers for a chunk of a signal, which `Stream` cuts: together they give what the whole gives.

    Args:
        x: ``[B, in, T]`` as for `stack`. Each layer's input ends with a whole stride, unless this is the last chunk,
            and is longer than the layer's reflect padding in the first.
        state: ``[B, packed.state_size]`` in the dtype of x, contiguous, left by the chunk before and overwritten for
            the next. It may be uninitialised at position 0, and is of no use after the last chunk.
        position: steps of the signal before this chunk.
        last: the signal ends here.

    Returns:
        ``[B, out, T']``, channels last in memory.
    """
    _check(x, packed.weights, packed.layers[1])
    if state.dim() != 2 or state.shape[0] != x.shape[0] or state.dtype != x.dtype or not state.is_contiguous():
        raise ValueError(f"state must be {x.dtype} [{x.shape[0]}, size], got {state.dtype} {list(state.shape)}")
    name = dispatch.select("seanet_stack_chunk", x, packed.weights, state, backend=backend)
    arguments = (state, position, last, block, name)
    return ops.stack_chunk(x.transpose(1, 2), packed.weights, packed.layers, *arguments).transpose(1, 2)


def lstm(
    x: Tensor, packed: PackedLSTM, *, state: Tensor | None = None, return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """An LSTM over time, for inference: it has no gradient.

    Args:
        x: ``[B, C, T]``, T at least 1, in the dtype of the weights, or fp32 where these are bf16.
        packed: made by `pack_lstm`.
        state: ``[layers, 2, B, C]``, h and c of each layer after the steps before; None for zeros.
        return_state: also give the state after the last step.

    Returns:
        ``[B, C, T]``, channels last in memory: ``LSTM(x)``, or ``x + LSTM(x)`` where ``packed.skip``.
    """
    _check(x, packed.weights, packed.channels)
    shape = (packed.layers, 2, x.shape[0], packed.channels)
    if state is not None and (tuple(state.shape) != shape or state.dtype != x.dtype):
        raise ValueError(f"state must be {x.dtype} {list(shape)}, got {state.dtype} {list(state.shape)}")
    name = dispatch.select("seanet_lstm", x, packed.weights, state, backend=backend)
    out, after = ops.lstm(x.transpose(1, 2), packed.weights, packed.channels, packed.skip, state, name)
    return (out.transpose(1, 2), after) if return_state else out.transpose(1, 2)


def norm_(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5, *, add: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """``GroupNorm(1, C)`` over channels and time, plus ``add``, in place and for inference: it has no gradient.

    Args:
        x: ``[B, C, T]``, channels last in memory, as the other functions return it.
        scale: ``[C]`` in the dtype of x.
        shift: ``[C]`` in the dtype of x.
        add: of the shape and dtype of x.

    Returns:
        x.
    """
    _check(x, scale, len(scale))
    if not x.mT.is_contiguous() or shift.shape != scale.shape or shift.dtype != x.dtype:
        raise ValueError("x must be channels last in memory, and scale and shift [C] in its dtype")
    if add is not None and (add.shape != x.shape or add.dtype != x.dtype):
        raise ValueError(f"add must be {x.dtype} {list(x.shape)}, got {add.dtype} {list(add.shape)}")
    name = dispatch.select("seanet_norm_", x, scale, shift, add, backend=backend)
    ops.norm_(x.mT, scale, shift, eps, None if add is None else add.mT, name)
    return x


def _needs_for_training(fields: Fields) -> tuple[str, ...]:
    """What no kernel takes gradients through."""
    found = {
        "dilation of a convolution with strides": fields.stride > 1 < fields.dilation,
        "gradients of Snake": fields.activation == SNAKE,
        "gradients of symmetric padding": fields.padding == SYMMETRIC,
    }
    return tuple(need for need, is_there in found.items() if is_there)


def _check(x: Tensor, weights: Tensor, channels: int) -> None:
    dtype = torch.float32 if weights.dtype == torch.bfloat16 else weights.dtype
    if x.dim() != 3 or x.shape[1] != channels or x.shape[2] < 1 or x.dtype != dtype:
        wanted = f"{dtype} [B, {channels}, T] with T at least 1"
        raise ValueError(f"x must be {wanted}, got {x.dtype} {list(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("packed layers are not differentiable; call them under torch.no_grad()")
