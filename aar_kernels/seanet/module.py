"""`PackedSEANet`: a whole encoder or decoder for inference, its weights packed once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

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

    Raises:
        ValueError: no layers, or layers that do not fit together.
    """

    def __init__(self, layers: Sequence[Layer | LSTM], *, dtype: torch.dtype = torch.float32):
        super().__init__()
        self._parts: list[PackedStack | PackedLSTM] = []
        for is_lstm, group in groupby(layers, lambda layer: isinstance(layer, LSTM)):
            parts = [pack_lstm(layer, dtype=dtype) for layer in group] if is_lstm else [pack(list(group), dtype=dtype)]
            self._parts += parts
        for i, part in enumerate(self._parts):
            self.register_buffer(f"weights{i}", part.weights)
        channels = [_channels(part) for part in self._parts]
        if not channels or any(a[1] != b[0] for a, b in zip(channels, channels[1:], strict=False)):
            raise ValueError(f"layers that do not follow each other: (input, output) channels {channels}")

    def forward(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """``[B, in, T]`` in the dtype of the weights -> ``[B, out, T']``. Not differentiable."""
        for i, part in enumerate(self._parts):
            part = part._replace(weights=getattr(self, f"weights{i}"))
            run = lstm if isinstance(part, PackedLSTM) else stack
            x = run(x, part, backend=backend)
        return x


def _channels(part: PackedStack | PackedLSTM) -> tuple[int, int]:
    if isinstance(part, PackedLSTM):
        return part.channels, part.channels
    return part.fields[0].inputs, part.fields[-1].outputs
