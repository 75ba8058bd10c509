"""Layers whose convolutions are each followed by a norm over time (EnCodec 48 kHz), for inference.

A norm needs the whole output of its convolution before it gives the first step of its own, so no block of the signal
can pass from layer to layer while it is in the cache: these run one after the other, over whole signals.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .api import norm_, stack
from .layers import NONE, TRANSPOSED, Conv, ConvTranspose, Layer, PackedStack, Residual, pack


def is_normed(layer: Layer) -> bool:
    convs = (layer.first, layer.narrow, layer.shortcut) if isinstance(layer, Residual) else (layer,)
    return any(getattr(conv, "norm", None) is not None for conv in convs)


def without_norms(layer: Layer) -> Layer:
    if not isinstance(layer, Residual):
        return replace(layer, norm=None)
    convs = {"first": layer.first, "narrow": layer.narrow, "shortcut": layer.shortcut}
    return Residual(**{name: None if conv is None else replace(conv, norm=None) for name, conv in convs.items()})


def normed(layer: Layer, *, dtype: torch.dtype) -> nn.Module:
    return NormedResidual(layer, dtype) if isinstance(layer, Residual) else NormedConv(layer, dtype)


class NormedConv(nn.Module):
    """A convolution and its norm, if it has one: ``[B, in, T]`` -> ``[B, out, T']``."""

    def __init__(self, layer: Conv | ConvTranspose, dtype: torch.dtype):
        super().__init__()
        packed = pack([without_norms(layer)], dtype=dtype)
        (self.fields,) = packed.fields
        self.register_buffer("weights", packed.weights)
        self.eps = None if layer.norm is None else layer.norm.eps
        if layer.norm is not None:
            wide = torch.promote_types(dtype, torch.float32)
            self.register_buffer("scale", layer.norm.weight.detach().to(wide, copy=True))
            self.register_buffer("shift", layer.norm.bias.detach().to(wide, copy=True))

    @property
    def channels(self) -> tuple[int, int]:
        return self.fields.inputs, self.fields.outputs

    def forward(self, x: Tensor, add: Tensor | None = None, backend: str | None = None) -> Tensor:
        """``add[B, out, T']`` is added to the result."""
        if self.fields.kind == TRANSPOSED and self.eps is not None:
            return self._transposed(x, backend)
        y = stack(x, PackedStack(self.weights, self.fields.numbers), backend=backend)
        if self.eps is None:
            return y if add is None else y.add_(add)
        return norm_(y, self.scale, self.shift, self.eps, add=add, backend=backend)

    def _transposed(self, x: Tensor, backend: str | None) -> Tensor:
        """The norm sees what is then trimmed."""
        fields, margin = self.fields, self.fields.context
        whole = (x.shape[2] - 1) * fields.stride + fields.kernel
        padded = F.pad(x.mT, (0, 0, margin, margin)).mT
        y = stack(padded, PackedStack(self.weights, fields._replace(padding=NONE).numbers), backend=backend)
        y = y[..., :whole].mT.contiguous().mT
        y = norm_(y, self.scale, self.shift, self.eps, backend=backend)
        return y[..., fields.trim : fields.trim + x.shape[2] * fields.stride]


class NormedResidual(nn.Module):
    """A residual block of such convolutions: ``[B, in, T]`` -> ``[B, out, T]``."""

    def __init__(self, layer: Residual, dtype: torch.dtype):
        super().__init__()
        pack([without_norms(layer)])  # only to learn whether its convolutions fit together
        elu = layer.first.snake is None
        self.first = NormedConv(replace(layer.first, elu=elu), dtype)
        self.narrow = NormedConv(replace(layer.narrow, elu=elu), dtype)
        self.shortcut = None if layer.shortcut is None else NormedConv(layer.shortcut, dtype)

    @property
    def channels(self) -> tuple[int, int]:
        return self.first.channels[0], self.narrow.channels[1]

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        around = x if self.shortcut is None else self.shortcut(x, backend=backend)
        return self.narrow(self.first(x, backend=backend), around, backend=backend)
