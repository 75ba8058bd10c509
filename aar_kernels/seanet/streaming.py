"""Streaming: a causal encoder or decoder takes a signal in chunks and gives what it would give for the whole."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .api import lstm, stack_chunk
from .layers import CAUSAL, SYMMETRIC, TRANSPOSED, PackedLSTM
from .module import PackedSEANet, Part


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
        self._parts = net.parts
        if any(isinstance(part, nn.Module) for part in self._parts):
            raise ValueError("a norm over time needs all of a signal, which a stream never has")
        self._outputs, self._tanh = net.outputs, net.tanh
        self.reset()
        #: Steps of input of which the length of a chunk must be a multiple.
        self.hop = 1
        #: Steps that the first chunk must have at least.
        self.first = 1
        steps, per = 1, 1  # a layer's input has `per` steps for each of `steps` steps of the net's input
        for fields in (fields for part in self._parts if not isinstance(part, PackedLSTM) for fields in part.fields):
            if fields.padding == SYMMETRIC or (fields.padding != CAUSAL and fields.context > 0):
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
        is_first = self._positions[0] == 0
        if x.dim() != 3 or (x.shape[2] % self.hop and not last):
            raise ValueError(f"a chunk but the last must be [B, C, T], T a multiple of {self.hop}, got {list(x.shape)}")
        if x.shape[2] < 1 and (is_first or not last):
            raise ValueError("a chunk without steps ends no signal and begins none")
        if is_first and not last and x.shape[2] < self.first:
            raise ValueError(f"the first chunk needs {self.first} steps for reflect padding, got {x.shape[2]}")
        if x.shape[2] < 1:
            x = x.new_empty(x.shape[0], self._outputs, 0)
        else:
            for i, part in enumerate(self._parts):
                x = self._part(i, part, x, last, backend)
            x = x.tanh_() if self._tanh else x
        if last:
            self.reset()
        return x

    def reset(self) -> None:
        """Forget the signal; the next chunk begins another one."""
        self._states: list[Tensor | None] = [None] * len(self._parts)  # None before the first chunk
        self._positions = [0] * len(self._parts)  # steps of a part's input that came before

    def _part(self, i: int, part: Part, x: Tensor, last: bool, backend: str | None) -> Tensor:
        state = self._states[i]
        if isinstance(part, PackedLSTM):
            out, state = lstm(x, part, state=state, return_state=True, backend=backend)
        else:
            state = x.new_empty(x.shape[0], part.state_size) if state is None else state
            out = stack_chunk(x, part, state, self._positions[i], last=last, backend=backend)
        self._states[i] = state
        self._positions[i] += x.shape[2]
        return out
