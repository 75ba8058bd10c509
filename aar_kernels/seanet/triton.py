"""Triton backend (kernels: `triton_kernels`): a launch for each layer, and cuDNN for the LSTM."""

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn

from .._triton import unavailable, wrong_device  # noqa: F401
from ..cache import DerivedCache
from ..graph import captured_elsewhere, keep
from . import chunk
from . import triton_kernels as kernels
from .layers import (
    CENTERED,
    ELU,
    NONE,
    RESIDUAL,
    SNAKE,
    SYMMETRIC,
    TRANSPOSED,
    Fields,
    PackedLSTM,
    PackedStack,
    split_weights,
    unpack_lstm,
)  # fmt: skip

_lstms: DerivedCache[nn.LSTM] = DerivedCache()


def unsupported(problem) -> str | None:
    if reason := wrong_device(problem):
        return reason
    if problem.dtype not in (torch.float32, torch.float16):
        return f"signals must be fp32 or fp16, got {problem.dtype}"
    return None


def stack(x: Tensor, weights: Tensor, layers: list[int], block: int) -> Tensor:
    """Layer by layer: at the sizes of a layer's output, a GPU's cache holds all of it or no useful part."""
    with torch.cuda.device_of(x):
        for fields, layer, _ in _layers(weights, layers):
            x = layer(x, fields)
    return x


def stack_chunk(
    x: Tensor, weights: Tensor, layers: list[int], state: Tensor, position: int, last: bool, block: int
) -> Tensor:
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        out = chunk.stack_chunk(x, _layers(weights, layers), state, position, last)
    torch.autograd.graph.increment_version(state)
    return out


def _layers(weights: Tensor, layers: list[int]) -> list[chunk.Layer]:
    found, packed = [], PackedStack(weights, tuple(layers))
    for fields, parts in zip(packed.fields, split_weights(packed), strict=True):
        run = _residual if fields.kind == RESIDUAL else _conv
        count = len(fields.products)
        products, snakes = parts[:count], parts[count:]
        alpha = snakes[0][: fields.inputs] if snakes else None

        def layer(x: Tensor, fields: Fields, run=run, products=products, snakes=snakes) -> Tensor:
            return run(x.contiguous(), fields, *products, *snakes)

        found.append((fields, layer, alpha))
    return found


def norm_(x: Tensor, scale: Tensor, shift: Tensor, eps: float, add: Tensor | None) -> None:
    batch, length, channels = x.shape
    size, block = length * channels, kernels.NORM["BLOCK"]
    blocks = triton.cdiv(size, block)
    chunk = triton.cdiv(blocks, kernels.PARTS) * block
    parts = triton.cdiv(size, chunk)
    if batch == 0:
        return
    moments = x.new_empty(batch, parts, 2, dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.moments_kernel[parts, batch](x, moments, size, chunk, **kernels.NORM)
        kernels.norm_kernel[blocks, batch](
            x, moments, scale.contiguous(), shift.contiguous(), None if add is None else add.contiguous(), size, chunk,
            parts, eps, C=channels, PARTS=triton.next_power_of_2(parts), **kernels.NORM,
        )  # fmt: skip


def lstm(x: Tensor, weights: Tensor, channels: int, skip: bool, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """By cuDNN, whose kernels keep the recurrent weights on the chip; in full fp32, which it leaves by default."""
    module = _module(x, weights, channels)
    before = None if state is None else tuple(part.contiguous() for part in state.unbind(1))
    with (
        torch.no_grad(),
        torch.autocast(x.device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        out, after = module(x.contiguous(), before)
    return (out + x if skip else out), torch.stack(after, 1)


def _module(x: Tensor, weights: Tensor, channels: int) -> nn.LSTM:
    def build() -> nn.LSTM:
        with torch.inference_mode(False), torch.no_grad():
            options = {"batch_first": True, "device": x.device, "dtype": x.dtype}
            module = nn.LSTM(channels, channels, weights.shape[0], **options).requires_grad_(False)
            for own, (w_ih, w_hh, bias) in zip(
                module.all_weights, unpack_lstm(PackedLSTM(weights, channels, False)), strict=True
            ):
                for parameter, value in zip(own, (w_ih, w_hh, bias, torch.zeros_like(bias)), strict=True):
                    parameter.copy_(value)
        return module

    return build() if captured_elsewhere() else keep(_lstms.get([weights], build, x.dtype))


def _snake(x: Tensor, alpha: Tensor) -> Tensor:
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), kernels.SNAKE["BLOCK"]),)
    if x.numel() > 0:
        kernels.snake_kernel[grid](x, alpha, out, x.numel(), C=x.shape[-1], **kernels.SNAKE)
    return out


def _conv(x: Tensor, fields: Fields, weights: Tensor, alpha: Tensor | None = None) -> Tensor:
    (_, columns), *_ = fields.products
    if fields.activation == SNAKE:  # else it is done, if there is alpha
        x = _snake(x, alpha)
    steps = fields.length(x.shape[1])
    out = x.new_empty(x.shape[0], steps, fields.outputs)
    if fields.kind == TRANSPOSED:
        steps = triton.cdiv(steps + fields.trim, fields.stride)
        return _launch(x, fields, weights, out, steps, columns, stride=1, skip=fields.trim * fields.outputs)
    return _launch(x, fields, weights, out, steps, columns, stride=fields.stride)


def _residual(
    x: Tensor, fields: Fields, first: Tensor, second: Tensor, alpha: Tensor | None = None,
    hidden_alpha: Tensor | None = None,
) -> Tensor:  # fmt: skip
    batch, length, inputs = x.shape
    steps, shortcut = fields.length(length), inputs * fields.shortcut
    out = x.new_empty(batch, steps, fields.outputs)
    snake = fields.activation == SNAKE
    if snake or fields.outputs > kernels.FUSED_CHANNELS:
        activated = _snake(x, alpha) if snake else x
        hidden = _launch(activated, fields, first, x.new_empty(batch, steps, fields.hidden), steps, fields.hidden)
        hidden = _snake(hidden, hidden_alpha) if snake else hidden
        narrow = fields._replace(inputs=fields.hidden, kernel=1, dilation=1)
        return _launch(hidden, narrow, second, out, steps, fields.outputs, around=x, shortcut=shortcut)
    left, edge = _padding(fields, length, steps)
    block = kernels.residual_block(fields.hidden, fields.outputs)
    kernels.residual_kernel[(triton.cdiv(batch * steps, block["BLOCK_M"]),)](
        x, first, second, out, batch * steps, steps, length, edge, left, C=inputs, H=fields.hidden, N=fields.outputs,
        TAPS=fields.kernel, DILATION=fields.dilation, REFLECT=_reflects(fields), SHORTCUT=shortcut, **block,
    )  # fmt: skip
    return out


def _launch(
    x: Tensor, fields: Fields, weights: Tensor, out: Tensor, steps: int, columns: int, *, stride: int = 1,
    skip: int = 0, around: Tensor | None = None, shortcut: int = 0,
) -> Tensor:  # fmt: skip
    """``out``, computed by ``steps`` rows of ``columns`` for each item."""
    batch, length, inputs = x.shape
    left, edge = _padding(fields, length, steps)
    block = kernels.conv_block(fields.taps, inputs, columns)
    grid = triton.cdiv(batch * steps, block["BLOCK_M"]), triton.cdiv(columns, block["BLOCK_N"])
    kernels.conv_kernel[grid](
        x, weights, around, out, batch * steps, steps, length, edge, left, skip, out.shape[1] * out.shape[2],
        0 if around is None else around.shape[1], C=inputs, N=columns, TAPS=fields.taps, STRIDE=stride,
        DILATION=fields.dilation, REFLECT=_reflects(fields), ELU=fields.activation == ELU, SHORTCUT=shortcut, **block,
    )  # fmt: skip
    return out


def _reflects(fields: Fields) -> bool:
    return bool(fields.reflect) and fields.padding != NONE and fields.span > 1


def _padding(fields: Fields, length: int, steps: int) -> tuple[int, int]:
    """Steps added on the left, and the step about which the end of the signal, filled with zeros where it is no longer
    than its padding, is reflected."""
    if fields.padding == NONE:
        return 0, length - 1
    if fields.kind == TRANSPOSED:
        return fields.context, length - 1
    total = fields.context
    if fields.padding == SYMMETRIC:
        return total - total // 2, max(length - 1, total - total // 2)
    right = total // 2 if fields.padding == CENTERED else 0
    longest = max(total - right, right + -length % fields.stride)
    return total - right, max(length - 1, longest)
