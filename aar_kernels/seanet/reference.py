"""SEANet's convolution stack and LSTM in plain PyTorch: the definition that every backend is held to.

Source: EnCodec, arXiv 2210.13438, section 3.1; its padding as in the public code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunk
from .activation import activate
from .layers import (  # fmt: skip
    CENTERED,
    NONE,
    RESIDUAL,
    SYMMETRIC,
    TRANSPOSED,
    Fields,
    PackedLSTM,
    PackedStack,
    unpack,
    unpack_lstm,
)


def unavailable() -> str | None:
    return None


def unsupported(problem) -> str | None:
    return None


def stack(x: Tensor, weights: Tensor, layers: list[int], block: int) -> Tensor:
    """``x[B, T, in]`` -> ``[B, T', out]``. ``block`` changes nothing here."""
    packed = PackedStack(weights.to(x.dtype), tuple(layers))
    x = x.transpose(1, 2)
    with torch.autocast(x.device.type, enabled=False):  # the dtype of x is what the operator promises
        for fields, parts in zip(packed.fields, unpack(packed), strict=True):
            x = _layer(x, fields, *parts)
    return x.transpose(1, 2).contiguous()


def layer(x: Tensor, weights: Tensor, fields: list[int]) -> Tensor:
    """The same through one layer; differentiable, as `stack` is."""
    return stack(x, weights, fields, 0)


def stack_chunk(
    x: Tensor, weights: Tensor, layers: list[int], state: Tensor, position: int, last: bool, block: int
) -> Tensor:
    """The same of a chunk, see `chunk.stack_chunk`."""
    packed = PackedStack(weights.to(x.dtype), tuple(layers))
    steps = [
        (fields, lambda x, fields, parts=parts: _layer(x.mT, fields, *parts).mT, next(iter(parts[1]), None))
        for fields, parts in zip(packed.fields, unpack(packed), strict=True)
    ]
    with torch.autocast(x.device.type, enabled=False):
        return chunk.stack_chunk(x, steps, state, position, last).contiguous()


def norm_(x: Tensor, scale: Tensor, shift: Tensor, eps: float, add: Tensor | None) -> None:
    """``x[B, T, C]`` becomes ``GroupNorm(1, C)(x)``, plus ``add[B, T, C]`` unless it is None."""
    with torch.autocast(x.device.type, enabled=False):
        out = torch.group_norm(x.transpose(1, 2), 1, scale, shift, eps).transpose(1, 2)
        x.copy_(out if add is None else out + add)


def lstm(x: Tensor, weights: Tensor, channels: int, skip: bool, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x[B, T, C]`` and the state before, ``[layers, 2, B, C]`` None: zeros -> x's size, the state after."""
    signal, states = x, []
    if state is None:
        state = x.new_zeros(weights.shape[0], 2, x.shape[0], channels)
    with torch.autocast(x.device.type, enabled=False):
        for layer, before in zip(unpack_lstm(PackedLSTM(weights.to(x.dtype), channels, skip)), state, strict=True):
            signal, after = _lstm_layer(signal, *layer, *before)
            states.append(after)
    return (signal + x if skip else signal.contiguous()), torch.stack(states)


def _layer(x: Tensor, fields: Fields, products: list[tuple[Tensor, Tensor]], snakes: list[Tensor]) -> Tensor:
    kind, alphas = fields.activation, snakes or [None, None]
    if fields.kind == RESIDUAL:
        (first, first_bias), (second, second_bias) = products
        hidden = activate(_conv(activate(x, kind, alphas[0]), fields, first, first_bias), kind, alphas[1])
        x = x[..., x.shape[-1] - hidden.shape[-1] :]  # without the steps that came before, if it begins with them
        if fields.shortcut:
            return _one_tap(torch.cat([hidden, x], 1), second, second_bias)
        return x + _one_tap(hidden, second, second_bias)
    x = activate(x, kind, alphas[0])
    return (_conv_transpose if fields.kind == TRANSPOSED else _conv)(x, fields, *products[0])


def _conv(x: Tensor, fields: Fields, matrix: Tensor, bias: Tensor) -> Tensor:
    weight = matrix.reshape(fields.kernel, fields.inputs, -1).permute(2, 1, 0)
    total = fields.context
    if fields.padding == SYMMETRIC:
        x = _pad(x, total - total // 2, total - total // 2, bool(fields.reflect))
    elif fields.padding != NONE:
        right = total // 2 if fields.padding == CENTERED else 0
        x = _pad(x, total - right, right + -x.shape[-1] % fields.stride, bool(fields.reflect))
    return F.conv1d(x, weight, bias, fields.stride, dilation=fields.dilation)


def _pad(x: Tensor, left: int, right: int, reflect: bool) -> Tensor:
    if not reflect:
        return F.pad(x, (left, right))
    missing = max(0, max(left, right) - x.shape[-1] + 1)  # reflection needs a signal longer than itself
    x = F.pad(F.pad(x, (0, missing)), (left, right), mode="reflect")
    return x[..., : x.shape[-1] - missing]


def _conv_transpose(x: Tensor, fields: Fields, matrix: Tensor, bias: Tensor) -> Tensor:
    stride, length = fields.stride, fields.length(x.shape[-1])
    taps = matrix.reshape(fields.taps, fields.inputs, stride, fields.outputs).permute(1, 3, 0, 2).flip(2)
    weight = taps.flatten(2)[..., : fields.kernel].contiguous()  # else it has no gradient in float64
    left = fields.context * stride if fields.padding == NONE else fields.trim
    return F.conv_transpose1d(x, weight, bias[: fields.outputs], stride)[..., left : left + length]


def _one_tap(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    return F.conv1d(x, matrix.t()[..., None], bias)


def _lstm_layer(x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    steps = []
    for gates in F.linear(x, w_ih, bias).unbind(1):
        i, f, g, o = (gates + F.linear(h, w_hh)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(h)
    return torch.stack(steps, 1), torch.stack([h, c])
