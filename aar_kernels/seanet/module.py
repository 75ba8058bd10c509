"""`PackedSEANet`: a whole encoder or decoder for inference, its weights packed once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from .api import lstm, stack
from .layers import LSTM, Layer, PackedLSTM, PackedStack, pack, pack_lstm


class PackedSEANet(nn.Module):
    """Layers in turn, for inference: ``[B, in, T]`` -> ``[B, out, T']``. It has buffers and no parameters.

    It is worth having where the native backend runs (`python -m aar_kernels.info`); elsewhere the reference unpacks the
    weights at each call.

    Args:
        layers: `Conv`, `ConvTranspose`, `Residual` and `LSTM`, whose weights are copied.
        dtype: of the weights, see `pack`.

    Raises:
        ValueError: no layers, or layers that do not fit together.
    """

    def __init__(self, layers: Sequence[Layer | LSTM], *, dtype: torch.dtype = torch.float32):
        super().__init__()
        parts: list[PackedStack | PackedLSTM] = []
        for is_lstm, group in groupby(layers, lambda layer: isinstance(layer, LSTM)):
            group = list(group)
            parts += [pack_lstm(layer, dtype=dtype) for layer in group] if is_lstm else [pack(group, dtype=dtype)]
        ends = [_channels(part) for part in parts]
        if not parts or any(before[1] != after[0] for before, after in pairwise(ends)):
            raise ValueError(f"layers that do not follow each other: (input, output) channels {ends}")
        for i, part in enumerate(parts):
            self.register_buffer(f"weights{i}", part.weights)
        self._parts = [part._replace(weights=None) for part in parts]

    @property
    def parts(self) -> list[PackedStack | PackedLSTM]:
        """What runs in turn."""
        return [part._replace(weights=getattr(self, f"weights{i}")) for i, part in enumerate(self._parts)]

    def forward(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """``[B, in, T]`` -> ``[B, out, T']``, in the dtype of the weights, or fp32 where these are bf16.

        Not differentiable.
        """
        for part in self.parts:
            run = lstm if isinstance(part, PackedLSTM) else stack
            x = run(x, part, backend=backend)
        return x


def _channels(part: PackedStack | PackedLSTM) -> tuple[int, int]:
    if isinstance(part, PackedLSTM):
        return part.channels, part.channels
    return part.fields[0].inputs, part.fields[-1].outputs
