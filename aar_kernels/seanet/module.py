"""`PackedSEANet`: a whole encoder or decoder for inference, its weights packed once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from .api import lstm, stack
from .layers import LSTM, Layer, PackedLSTM, PackedStack, Tanh, pack, pack_lstm
from .normed import is_normed, normed

Part = PackedStack | PackedLSTM | nn.Module
LSTM_STEPS = 16384  # of a longer signal, which is then overwritten, that an LSTM takes at a time


class PackedSEANet(nn.Module):
    """Layers in turn, for inference: ``[B, in, T]`` -> ``[B, out, T']``. It has buffers and no parameters.

    It is worth having where the native or the Triton backend runs (`python -m aar_kernels.info`; Triton's has no norms
    over time and has not yet run on hardware); elsewhere the reference unpacks the weights at each call.

    Args:
        layers: `Conv`, `ConvTranspose`, `Residual` and `LSTM`, whose weights are copied, and `Tanh` behind the last.
        dtype: of the weights, see `pack`.

    Raises:
        ValueError: no layers, or layers that do not fit together.
    """

    def __init__(self, layers: Sequence[Layer | LSTM | Tanh], *, dtype: torch.dtype = torch.float32):
        super().__init__()
        #: Whether the last layer's output goes through a hyperbolic tangent.
        self.tanh = len(layers) > 1 and isinstance(layers[-1], Tanh)
        parts: list[Part] = []
        layers = layers[:-1] if self.tanh else layers
        for kind, group in groupby(layers, _kind):
            group = list(group)
            if kind == "stack":
                parts.append(pack(group, dtype=dtype))
            else:
                parts += [(pack_lstm if kind == "lstm" else normed)(layer, dtype=dtype) for layer in group]
        ends = [_channels(part) for part in parts]
        if not parts or any(before[1] != after[0] for before, after in pairwise(ends)):
            raise ValueError(f"layers that do not follow each other: (input, output) channels {ends}")
        #: Channels of what goes in, and of what comes out.
        self.inputs, self.outputs = ends[0][0], ends[-1][1]
        self._parts: list[PackedStack | PackedLSTM | None] = []  # None: a module, which holds its own weights
        for i, part in enumerate(parts):
            if isinstance(part, nn.Module):
                self.add_module(f"layer{i}", part)
            else:
                self.register_buffer(f"weights{i}", part.weights)
            self._parts.append(None if isinstance(part, nn.Module) else part._replace(weights=None))

    @property
    def parts(self) -> list[Part]:
        """What runs in turn."""
        return [
            getattr(self, f"layer{i}") if part is None else part._replace(weights=getattr(self, f"weights{i}"))
            for i, part in enumerate(self._parts)
        ]

    def length(self, steps: int) -> int:
        """Steps of output for ``steps`` of input; below 1 where these are fewer than a layer reads."""
        for part in self.parts:
            for fields in part.fields if isinstance(part, PackedStack) else []:
                steps = fields.length(steps) if steps > 0 else 0
        return steps

    def forward(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """``[B, in, T]`` -> ``[B, out, T']``, in the dtype of the weights, or fp32 where these are bf16.

        Not differentiable.
        """
        for i, part in enumerate(self.parts):
            if isinstance(part, nn.Module):
                x = part(x, backend=backend)
            elif isinstance(part, PackedStack):
                x = stack(x, part, backend=backend)
            elif i > 0 and x.shape[2] > LSTM_STEPS:
                _lstm_in_place(x, part, backend)
            else:
                x = lstm(x, part, backend=backend)
        return x.tanh_() if self.tanh else x


def _lstm_in_place(x: Tensor, part: PackedLSTM, backend: str | None) -> None:
    """A long signal at the latent rate is the most that is in memory: an hour of it is half a gigabyte."""
    state = None
    for chunk in x.split(LSTM_STEPS, dim=2):
        out, state = lstm(chunk, part, state=state, return_state=True, backend=backend)
        chunk.copy_(out)


def _kind(layer: Layer | LSTM) -> str:
    return "lstm" if isinstance(layer, LSTM) else "normed" if is_normed(layer) else "stack"


def _channels(part: Part) -> tuple[int, int]:
    if isinstance(part, nn.Module):
        return part.channels
    if isinstance(part, PackedLSTM):
        return part.channels, part.channels
    return part.fields[0].inputs, part.fields[-1].outputs
