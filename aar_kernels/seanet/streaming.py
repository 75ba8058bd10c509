"""Streaming: a causal encoder or decoder takes a signal in chunks and gives what it would give for the whole."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .api import lstm, stack
from .layers import CAUSAL, NONE, TRANSPOSED, Fields, PackedLSTM, PackedStack
from .module import PackedSEANet


class Stream:
    """The state of a `PackedSEANet` between two chunks of a signal.

    Each layer keeps the steps of its input that later outputs depend on, and an LSTM its state. Chunks whose lengths
    are multiples of `hop`, and a last one of any length, together give exactly what ``net`` gives for the whole signal.

    Reflect padding mirrors the beginning of the signal, so a net that has it needs `first` steps in its first chunk,
    unless that is the last one too.

    Raises:
        ValueError: a layer that is not causal: it sees the future.
    """

    def __init__(self, net: PackedSEANet):
        self._layers: list[PackedStack | PackedLSTM] = []
        for part in net.parts:
            if isinstance(part, nn.Module):
                raise ValueError("a norm over time needs all of a signal, which a stream never has")
            self._layers += [part] if isinstance(part, PackedLSTM) else _single_layers(part)
        self._outputs = net.outputs
        self._states: list[Tensor | None] = [None] * len(self._layers)  # None before the first chunk
        self._odd = [0] * len(self._layers)  # whether an odd number of steps of a layer's product came before
        #: Steps of input of which the length of a chunk must be a multiple.
        self.hop = 1
        #: Steps that the first chunk must have at least.
        self.first = 1
        steps, per = 1, 1  # a layer's input has `per` steps for each of `steps` steps of the net's input
        for layer in self._layers:
            if isinstance(layer, PackedLSTM):
                continue
            (fields,) = layer.fields
            if fields.padding != CAUSAL and fields.context > 0:
                raise ValueError(f"a stream needs causal layers, and this one is not: {fields}")
            if fields.reflect and fields.context > 0:
                self.first = max(self.first, -(-(fields.context + 1) * steps // per))
            steps, per = (steps, per * fields.stride) if fields.kind == TRANSPOSED else (steps * fields.stride, per)
            self.hop = math.lcm(self.hop, steps // math.gcd(steps, per))

    def __call__(self, x: Tensor, *, last: bool = False, backend: str | None = None) -> Tensor:
        """The next chunk ``[B, in, T]`` -> the output that it completes, ``[B, out, T']``.

        Args:
            last: the signal ends here, and is padded as a whole one is; the next chunk begins another signal. T is any
                number then, 0 too unless it is the first chunk.

        Raises:
            ValueError: T is no multiple of `hop`, or less than `first` in the first chunk; or as `stack` says.
        """
        is_first = self._states[0] is None
        if x.dim() != 3 or (x.shape[2] % self.hop and not last):
            raise ValueError(f"a chunk but the last must be [B, C, T], T a multiple of {self.hop}, got {list(x.shape)}")
        if x.shape[2] < 1 and (is_first or not last):
            raise ValueError("a chunk without steps ends no signal and begins none")
        if is_first and not last and x.shape[2] < self.first:
            raise ValueError(f"the first chunk needs {self.first} steps for reflect padding, got {x.shape[2]}")
        if x.shape[2] < 1:
            x = x.new_empty(x.shape[0], self._outputs, 0)
        else:
            for i, layer in enumerate(self._layers):
                if isinstance(layer, PackedLSTM):
                    x, self._states[i] = lstm(x, layer, state=self._states[i], return_state=True, backend=backend)
                else:
                    x = self._layer(i, layer, x, last, backend)
        if last:
            self.reset()
        return x

    def reset(self) -> None:
        """Forget the signal; the next chunk begins another one."""
        self._states = [None] * len(self._layers)
        self._odd = [0] * len(self._layers)

    def _layer(self, i: int, layer: PackedStack, x: Tensor, last: bool, backend: str | None) -> Tensor:
        (fields,) = layer.fields
        before = self._states[i]
        if before is None:
            seen = x
        else:
            seen = torch.cat([before, x], 2)
            x = _fill_stride(seen, x.shape[2], fields) if last else seen
            x = x[..., before.shape[2] - fields.context :]
            layer = layer._replace(layers=fields._replace(padding=NONE, odd=self._odd[i]).numbers)
        out = stack(x, layer, backend=backend)
        if not last:
            steps = out.shape[2] // (fields.stride if fields.kind == TRANSPOSED else 1)
            self._odd[i] = (self._odd[i] + steps) % 2
            self._states[i] = _end(seen, _kept(fields))
        return out


def _kept(fields: Fields) -> int:
    """Steps of a layer's input that its later outputs depend on."""
    mirrored = fields.stride - 1 if fields.kind != TRANSPOSED and fields.reflect else 0  # by the end of a signal
    return max(fields.context, mirrored)


def _end(x: Tensor, steps: int) -> Tensor:
    """The last steps of a signal, zeros where it began later."""
    return F.pad(x, (steps - x.shape[2], 0)).contiguous()


def _fill_stride(seen: Tensor, steps: int, fields: Fields) -> Tensor:
    """The end of a signal, of which ``steps`` are new, with what its last stride lacks."""
    lacking = 0 if fields.kind == TRANSPOSED else -steps % fields.stride
    return F.pad(seen, (0, lacking), mode="reflect" if fields.reflect else "constant")


def _single_layers(part: PackedStack) -> list[PackedStack]:
    layers, at = [], 0
    for fields in part.fields:
        size = sum(fields.sizes)
        layers.append(PackedStack(part.weights[at : at + size], fields.numbers))
        at += size
    return layers
