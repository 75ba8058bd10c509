"""Streaming: a causal encoder or decoder takes a signal in chunks and gives what it would give for the whole."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .api import lstm, stack
from .layers import CAUSAL, NONE, TRANSPOSED, PackedLSTM, PackedStack
from .module import PackedSEANet


class Stream:
    """The state of a `PackedSEANet` between two chunks of a signal.

    Each layer keeps the steps of its input that later outputs depend on, and an LSTM its state. Chunks whose lengths
    are multiples of `hop` together give exactly what ``net`` gives for the whole signal.

    Reflect padding mirrors the beginning of the signal, so a net that has it needs `first` steps in its first chunk.

    Raises:
        ValueError: a layer that is not causal: it sees the future.
    """

    def __init__(self, net: PackedSEANet):
        self._layers: list[PackedStack | PackedLSTM] = []
        for part in net.parts:
            if isinstance(part, nn.Module):
                raise ValueError("a norm over time needs all of a signal, which a stream never has")
            self._layers += [part] if isinstance(part, PackedLSTM) else _single_layers(part)
        self._states: list[Tensor | None] = [None] * len(self._layers)
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

    def __call__(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """The next chunk ``[B, in, T]`` -> the output that it completes, ``[B, out, T']``.

        Raises:
            ValueError: T is no multiple of `hop`, or less than `first` in the first chunk; or as `stack` says.
        """
        if x.dim() != 3 or x.shape[2] < 1 or x.shape[2] % self.hop:
            raise ValueError(f"a chunk must be [B, C, T] with T a multiple of {self.hop}, got {list(x.shape)}")
        is_first = all(state is None for state in self._states)
        if is_first and x.shape[2] < self.first:
            raise ValueError(f"the first chunk needs {self.first} steps for reflect padding, got {x.shape[2]}")
        for i, layer in enumerate(self._layers):
            if isinstance(layer, PackedLSTM):
                x, self._states[i] = lstm(x, layer, state=self._states[i], return_state=True, backend=backend)
            else:
                x = self._layer(i, layer, x, backend)
        return x

    def reset(self) -> None:
        """Forget the signal; the next chunk begins another one."""
        self._states = [None] * len(self._layers)
        self._odd = [0] * len(self._layers)

    def _layer(self, i: int, layer: PackedStack, x: Tensor, backend: str | None) -> Tensor:
        (fields,) = layer.fields
        before = self._states[i]
        seen = x if before is None else torch.cat([before, x], 2)
        if before is not None:
            layer = layer._replace(layers=fields._replace(padding=NONE, odd=self._odd[i]).numbers)
        out = stack(seen, layer, backend=backend)
        steps = out.shape[2] // (fields.stride if fields.kind == TRANSPOSED else 1)
        self._odd[i] = (self._odd[i] + steps) % 2
        if fields.context > 0:
            if before is None and x.shape[2] < fields.context:  # zeros came before the first step
                seen = F.pad(x, (fields.context - x.shape[2], 0))
            self._states[i] = seen[..., -fields.context :].contiguous()
        return out


def _single_layers(part: PackedStack) -> list[PackedStack]:
    layers, at = [], 0
    for fields in part.fields:
        size = sum(fields.sizes)
        layers.append(PackedStack(part.weights[at : at + size], fields.numbers))
        at += size
    return layers
