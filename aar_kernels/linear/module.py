"""`PackedLinear`: an ``nn.Linear`` for inference, its weight packed once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .api import linear
from .weight import PackedWeight, pack


class PackedLinear(nn.Module):
    """``activation(x @ W.T + bias)`` for inference, made by `from_linear`; it has buffers and no parameters.

    It is worth having where the native backend or Triton runs (`python -m aar_kernels.info`); elsewhere the reference
    unpacks the weight at each call. Its ``state_dict`` fits modules of the same sizes, dtype and kind of device.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, *, activation: str | None = None):
        super().__init__()
        self.in_features, self.out_features, self.activation = packed.K, packed.N, activation
        self.register_buffer("data", packed.data)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_linear(
        cls, layer: nn.Linear, *, dtype: torch.dtype = torch.float32, activation: str | None = None
    ) -> PackedLinear:
        """A copy of ``layer`` with its weight in ``dtype`` (see `pack`), followed by ``activation``."""
        return cls(pack(layer.weight, dtype=dtype), layer.bias, activation=activation)

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.data, self.scale, self.out_features)

    def forward(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """``x[..., in_features]`` -> ``[..., out_features]`` in its dtype. Not differentiable."""
        return linear(x, self.packed, self.bias, activation=self.activation, backend=backend)

    def _apply(self, function, recurse: bool = True) -> PackedLinear:
        device, data, scale = self.data.device, self.data, self.scale
        super()._apply(function, recurse)
        if scale is not None:  # int8, fp8 and their scales in fp32 are kept where the module becomes bf16
            self.data, self.scale = data.to(self.data.device), scale.to(self.data.device)
        if self.data.device.type != device.type:  # each kind of device has its own layout
            self.data, self.scale, _ = self.packed.to(self.data.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.data.dtype}, activation={self.activation}"
        )
