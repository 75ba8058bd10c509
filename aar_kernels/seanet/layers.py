"""The layers of a SEANet with their weights, and the form in which kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16  # output channels side by side in memory; the same for every instruction set (csrc/include/aar/seanet.h)
CONV, TRANSPOSED, RESIDUAL = range(3)  # kinds of a layer
CENTERED, CAUSAL, NONE, SYMMETRIC = range(4)  # paddings; NONE where the input begins with the steps that came before
IDENTITY, ELU, SNAKE = range(3)  # activations of the input


@dataclass(frozen=True, eq=False)
class Norm:
    """``GroupNorm(1, C)``: each item has mean 0 and variance 1 over channels and time, then a scale for each channel.

    Args:
        weight: ``[C]``.
        bias: ``[C]``.
    """

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


@dataclass(frozen=True, eq=False)
class Conv:
    """``Conv1d``, padded as EnCodec does: ``[B, in, T]`` -> ``[B, out, ceil(T / stride)]``.

    With ``total = dilation * (kernel - 1) + 1 - stride``, ``total // 2`` steps are added on the right and the rest on
    the left, or all on the left if causal; and on the right what the last stride lacks. A signal no longer than its
    padding is first extended by zeros.

    Args:
        weight: ``[out, in, kernel]``, weight norm folded.
        bias: ``[out]``, or None.
        reflect: what is added is the signal reflected, else zeros.
        elu: of the input, before the convolution.
        norm: of the output, or None.
        snake: ``[in]``, alpha of each channel: Snake of the input, ``x + sin(alpha x)^2 / (alpha + 1e-9)``, in place
            of ELU.
        symmetric: padded as DAC does: as many steps on the right as on the left, nothing for the last stride, and so
            ``(T + total % 2) // stride`` steps of output.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    reflect: bool = True
    elu: bool = False
    norm: Norm | None = None
    snake: Tensor | None = None
    symmetric: bool = False


@dataclass(frozen=True, eq=False)
class ConvTranspose:
    """``ConvTranspose1d``, trimmed as EnCodec does: ``[B, in, T]`` -> ``[B, out, T * stride]``.

    With ``total = kernel - stride``, ``total // 2`` steps are cut on the right and the rest on the left, or all on the
    right if causal.

    Args:
        weight: ``[in, out, kernel]``, weight norm folded.
        bias: ``[out]``, or None.
        elu: of the input, before the convolution.
        norm: of the output before it is trimmed, or None.
        snake: ``[in]``, as of `Conv`.
        symmetric: trimmed as DAC does: as many steps on the right as on the left, ``T * stride - total % 2`` are left.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    causal: bool = False
    elu: bool = False
    norm: Norm | None = None
    snake: Tensor | None = None
    symmetric: bool = False


@dataclass(frozen=True, eq=False)
class Residual:
    """``narrow(ELU(first(ELU(x)))) + shortcut(x)``: ``[B, in, T]`` -> ``[B, out, T]``.

    Args:
        first: a convolution of stride 1. Its ELU is taken for granted, unless both it and ``narrow`` have Snake.
        narrow: a convolution with one tap, back to ``out`` channels.
        shortcut: the same from the input, or None for the identity.
    """

    first: Conv
    narrow: Conv
    shortcut: Conv | None = None


@dataclass(frozen=True, eq=False)
class LSTM:
    """Layers of an ``nn.LSTM`` whose input and hidden sizes are equal, from a state of zeros, and x + LSTM(x).

    Args:
        weights: of each layer ``weight_ih``, ``weight_hh`` ``[4 C, C]``, ``bias_ih``, ``bias_hh`` ``[4 C]``.
        skip: whether x is added.
    """

    weights: Sequence[Sequence[Tensor]]
    skip: bool = True


@dataclass(frozen=True)
class Tanh:
    """Of each number, behind the last layer of a `PackedSEANet`."""


Layer = Conv | ConvTranspose | Residual


class Fields(NamedTuple):
    """A layer without its weights, as operators take it: 11 numbers (csrc/bindings/torch_seanet.cpp)."""

    kind: int
    inputs: int
    hidden: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    padding: int
    reflect: int
    activation: int
    shortcut: int

    @property
    def taps(self) -> int:
        return -(-self.kernel // self.stride) if self.kind == TRANSPOSED else self.kernel

    @property
    def products(self) -> list[tuple[int, int]]:
        """(K, N) of each of the layer's matrix products."""
        if self.kind == RESIDUAL:
            second = (self.hidden + self.inputs * self.shortcut, self.outputs)
            return [(self.kernel * self.inputs, self.hidden), second]
        return [(self.taps * self.inputs, self.outputs * (self.stride if self.kind == TRANSPOSED else 1))]

    @property
    def snakes(self) -> list[int]:
        """Channels of each Snake."""
        if self.activation != SNAKE:
            return []
        return [self.inputs, self.hidden] if self.kind == RESIDUAL else [self.inputs]

    @property
    def sizes(self) -> list[int]:
        """Numbers of each product's packed weights, and of each Snake's alpha."""
        products = [-(-N // PANEL) * (K + 1) * PANEL for K, N in self.products]
        return products + [-(-channels // PANEL) * PANEL for channels in self.snakes]

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(int(number) for number in self)

    @property
    def span(self) -> int:
        """Steps of input that a step of the first product reads."""
        return self.taps if self.kind == TRANSPOSED else (self.kernel - 1) * self.dilation + 1

    @property
    def context(self) -> int:
        """Steps of input before a stride that its outputs depend on, where the layer is causal."""
        return self.span - (1 if self.kind == TRANSPOSED else self.stride)

    @property
    def kept(self) -> int:
        """Steps of a causal layer's input that its outputs after a chunk depend on."""
        mirrored = self.stride - 1 if self.kind != TRANSPOSED and self.reflect else 0  # by the end of the signal
        return max(self.context, mirrored)

    @property
    def trim(self) -> int:
        """Steps of output that a padded transposed convolution drops before its first."""
        total = self.kernel - self.stride
        return total - total // 2 if self.padding in (CENTERED, SYMMETRIC) else 0

    def length(self, length: int) -> int:
        """Steps of output for steps of input."""
        if self.padding == NONE:
            length -= self.context
        if self.kind == TRANSPOSED:
            return length * self.stride - (self.kernel - self.stride) % 2 * (self.padding == SYMMETRIC)
        if self.padding == SYMMETRIC:
            length += self.context % 2
        return length // self.stride if self.padding in (NONE, SYMMETRIC) else -(-length // self.stride)

    def flops(self, length: int) -> int:
        """Useful multiplications and additions for ``length`` steps of input."""
        if self.kind == TRANSPOSED:
            return 2 * self.inputs * self.outputs * self.kernel * length
        return 2 * sum(K * N for K, N in self.products) * self.length(length)


class PackedStack(NamedTuple):
    """Layers whose weights were copied into one tensor, made by `pack`."""

    # Of each layer's products in turn [ceil(N / PANEL), K + 1, PANEL], zeros after N; row K is the bias. Behind them
    # alpha of its Snakes, zeros up to whole panels.
    weights: Tensor
    layers: tuple[int, ...]  # Fields of each layer, one after the other

    @property
    def fields(self) -> list[Fields]:
        return split_fields(self.layers)

    @property
    def state_size(self) -> int:
        """Numbers that causal layers keep of an item between two chunks."""
        return sum(fields.kept * fields.inputs for fields in self.fields)


class PackedLSTM(NamedTuple):
    """An LSTM whose weights were copied into one tensor, made by `pack_lstm`."""

    weights: Tensor  # [layers, 2, groups of 16 units, gates i f g o, C + 1, 16]: input weights, recurrent ones
    channels: int
    skip: bool

    @property
    def layers(self) -> int:
        return self.weights.shape[0]


def split_fields(numbers: Sequence[int]) -> list[Fields]:
    size = len(Fields._fields)
    return [Fields(*numbers[i : i + size]) for i in range(0, len(numbers), size)]


def pack(layers: Sequence[Layer], *, dtype: torch.dtype = torch.float32) -> PackedStack:
    """Copy the weights of layers that follow each other. Later changes of them do not reach the copy.

    Args:
        dtype: of the copy. torch.bfloat16 halves what is read for each weight; signals and sums stay fp32. Latents
            move by some thousandths, enough to change one code in ten or more.

    Raises:
        ValueError: no layers, shapes that do not fit, or options that no layer has.
    """
    if not layers:
        raise ValueError("a stack needs a layer")
    with torch.no_grad():
        fields, parts = zip(*describe_all(layers), strict=True)
        return PackedStack(torch.cat(parts).to(dtype), tuple(number for layer in fields for number in layer.numbers))


def describe_all(layers: Sequence[Layer]) -> list[tuple[Fields, Tensor]]:
    """Of layers that follow each other, each without its weights, and its weights as a stack holds them.

    The weights are differentiable functions of the layer's.

    Raises:
        ValueError: shapes that do not fit, or options that no layer has.
    """
    described = []
    for layer in layers:
        fields, products, snakes = _describe(layer)
        if described and described[-1][0].outputs != fields.inputs:
            raise ValueError(f"a layer of {fields.inputs} channels follows one of {described[-1][0].outputs}")
        parts = [_panels(*product).flatten() for product in products]
        parts += [F.pad(alpha, (0, -len(alpha) % PANEL)) for alpha in snakes]
        described.append((fields, torch.cat(parts) if len(parts) > 1 else parts[0]))
    return described


def pack_lstm(lstm: LSTM, *, dtype: torch.dtype = torch.float32) -> PackedLSTM:
    """Copy the weights of an LSTM, in ``dtype`` as `pack` does.

    Raises:
        ValueError: no layers, or shapes that do not fit.
    """
    if not lstm.weights:
        raise ValueError("an LSTM needs a layer")
    channels = lstm.weights[0][1].shape[-1]
    layers = []
    for tensors in lstm.weights:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if channels < 1 or shapes != [(4 * channels, channels)] * 2 + [(4 * channels,)] * 2:
            raise ValueError(f"an LSTM layer has [4 C, C] twice and [4 C] twice, got {shapes}")
        w_ih, w_hh, b_ih, b_hh = (tensor.detach() for tensor in tensors)
        bias = b_ih + b_hh
        layers.append(torch.stack([_gates(w_ih, bias), _gates(w_hh, torch.zeros_like(bias))]).to(dtype))
    return PackedLSTM(torch.stack(layers), channels, lstm.skip)


def split_weights(packed: PackedStack) -> list[list[Tensor]]:
    """Of each layer the parts of its packed weights, as long as its ``sizes``."""
    fields = packed.fields
    parts = iter(packed.weights.split([size for layer in fields for size in layer.sizes]))
    return [list(islice(parts, len(layer.sizes))) for layer in fields]


def unpack(packed: PackedStack) -> list[tuple[list[tuple[Tensor, Tensor]], list[Tensor]]]:
    """Of each layer its products, ``[K, N]`` and bias ``[N]``, and alpha of its Snakes."""
    layers = []
    for fields, parts in zip(packed.fields, split_weights(packed), strict=True):
        products = []
        for K, N in fields.products:
            rows = parts.pop(0).view(-1, K + 1, PANEL).transpose(0, 1).flatten(1)[:, :N]
            products.append((rows[:K], rows[K]))
        layers.append((products, [part[:channels] for part, channels in zip(parts, fields.snakes, strict=True)]))
    return layers


def unpack_lstm(packed: PackedLSTM) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer ``weight_ih``, ``weight_hh`` ``[4 C, C]`` and the sum of the biases ``[4 C]``."""
    layers = []
    for tensor in packed.weights:  # [2, groups, 4, C + 1, 16] -> [2, 4, C, C + 1]
        rows = tensor.permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, : packed.channels].flatten(1, 2)
        layers.append((rows[0, :, :-1], rows[1, :, :-1], rows[0, :, -1]))
    return layers


def _gates(weight: Tensor, bias: Tensor) -> Tensor:
    """``[4 C, C]`` -> ``[groups, 4, C + 1, 16]``."""
    channels = weight.shape[1]
    rows = torch.cat([weight, bias[:, None]], 1).view(4, channels, channels + 1)
    return F.pad(rows, (0, 0, 0, -channels % PANEL)).view(4, -1, PANEL, channels + 1).permute(1, 0, 3, 2)


def _panels(matrix: Tensor, bias: Tensor) -> Tensor:
    """``[K, N]`` and ``[N]`` -> ``[ceil(N / PANEL), K + 1, PANEL]``."""
    if missing := -matrix.shape[1] % PANEL:  # padding by nothing would copy
        matrix, bias = F.pad(matrix, (0, missing)), F.pad(bias, (0, missing))
    return torch.cat([matrix.unflatten(1, (-1, PANEL)).transpose(0, 1), bias.view(-1, 1, PANEL)], 1)


Described = tuple[Fields, list[tuple[Tensor, Tensor]], list[Tensor]]  # and what `unpack` gives


def _describe(layer: Layer) -> Described:
    if isinstance(layer, Residual):
        return _describe_residual(layer)
    transposed = isinstance(layer, ConvTranspose)
    if not isinstance(layer, (Conv, ConvTranspose)):
        raise ValueError(f"a layer is a Conv, ConvTranspose or Residual, got {type(layer).__name__}")
    dilation, reflect = (1, False) if transposed else (layer.dilation, layer.reflect)
    weight, bias, stride = layer.weight, layer.bias, layer.stride
    if layer.norm is not None:
        raise ValueError("a norm over time needs all of a signal, and a stack has a block of it; use PackedSEANet")
    if weight.dim() != 3 or 0 in weight.shape or not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be floating point in 3 dimensions, got {weight.dtype} {list(weight.shape)}")
    inputs, outputs, kernel = (weight.shape[i] for i in ((0, 1, 2) if transposed else (1, 0, 2)))
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got {list(bias.shape)}")
    if stride < 1 or dilation < 1 or (kernel - 1) * dilation + 1 < stride:
        raise ValueError(f"a kernel of {kernel}, dilated by {dilation}, does not cover a stride of {stride}")
    snakes = [] if layer.snake is None else [layer.snake]
    if any(layer.elu or tuple(alpha.shape) != (inputs,) for alpha in snakes):
        raise ValueError(f"snake must be [{inputs}], in place of ELU, got {list(layer.snake.shape)}, ELU {layer.elu}")
    if layer.symmetric and layer.causal:
        raise ValueError("padding is either causal or symmetric")
    kind, padding = TRANSPOSED if transposed else CONV, CAUSAL if layer.causal else CENTERED
    activation = SNAKE if snakes else ELU if layer.elu else IDENTITY
    fields = Fields(kind, inputs, 0, outputs, kernel, stride, dilation, padding, reflect, activation, 0)
    # Where it is the same, it is called centered.
    total = kernel - stride if transposed else fields.context
    if layer.symmetric and (total % 2 or (stride > 1 and not transposed)):
        fields = fields._replace(padding=SYMMETRIC)
    bias = weight.new_zeros(outputs) if bias is None else bias
    if not transposed:
        return fields, [(weight.permute(2, 1, 0).reshape(-1, outputs), bias)], snakes
    # Step o of the product reads inputs o - taps + 1 to o and gives the output's steps o * stride to (o + 1) * stride.
    taps = F.pad(weight, (0, fields.taps * stride - kernel)).view(inputs, outputs, fields.taps, stride).flip(2)
    return fields, [(taps.permute(2, 0, 3, 1).reshape(-1, stride * outputs), bias.repeat(stride))], snakes


def _describe_residual(layer: Residual) -> Described:
    first, products, snakes = _describe(layer.first)
    described = [_describe(conv) for conv in (layer.narrow, layer.shortcut) if conv is not None]
    parts = [fields for fields, *_ in described]
    snakes = snakes + described[0][2]
    if len(snakes) == 1 or any(alphas for *_, alphas in described[1:]):
        raise ValueError("a residual block has two Snakes or none, and none in its shortcut")
    if first.stride != 1 or any((part.kernel, part.stride) != (1, 1) for part in parts):
        raise ValueError("a residual block has a first convolution of stride 1, and then convolutions of one tap")
    if first.padding == SYMMETRIC:
        raise ValueError("the first convolution of a residual block keeps the number of steps")
    outputs = first.inputs if layer.shortcut is None else parts[1].outputs
    fitting = [(first.outputs, outputs), (first.inputs, outputs)]
    if [(part.inputs, part.outputs) for part in parts] != fitting[: len(parts)]:
        raise ValueError("the convolutions of a residual block do not fit together")
    fields = first._replace(
        kind=RESIDUAL, hidden=first.outputs, outputs=outputs, activation=SNAKE if snakes else ELU,
        shortcut=len(parts) - 1,
    )  # fmt: skip
    # One product gives the sum of both, over the hidden channels and the input's.
    matrices, biases = zip(*(product for _, [product], _ in described), strict=True)
    return fields, [*products, (torch.cat(matrices), sum(biases))], snakes
