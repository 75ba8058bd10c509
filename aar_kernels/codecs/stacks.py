"""Convolutional encoders and decoders of the SEANet kind, on the packed layers of `aar_kernels.seanet`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import DerivedCache
from ..seanet import LSTM, PackedSEANet
from ..seanet.layers import Layer
from .adapter import Adapter, Unsupported, traced

_packed: DerivedCache[PackedSEANet] = DerivedCache()


class Stack(Adapter):
    """``_run`` on the layers that ``_layers`` finds in the module."""

    def _layers(self) -> Sequence[Layer | LSTM]:
        """Raises ValueError for a part that these layers cannot express."""
        raise NotImplementedError

    @torch.no_grad()
    def _check(self) -> str:
        """Compares both on a probe, since attributes do not tell all that a forward pass does."""
        weight = next(self.parameters())
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise Unsupported(f"its weights are {weight.dtype} on {weight.device}; these layers are float32 on a CPU")
        try:
            packed = PackedSEANet(self._layers())
        except ValueError as reason:
            raise Unsupported(str(reason)) from None
        first, last = packed.parts[0].fields[0], packed.parts[-1].fields[-1]
        length = 1280 if first.inputs < last.outputs else 8  # some frames, for an encoder and for a decoder
        probe = torch.randn(1, first.inputs, length, generator=torch.Generator().manual_seed(0))
        ours, theirs = packed(probe, backend="reference"), self._aar_original.forward(self, probe)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max()):
            raise Unsupported("on a probe its output is not what its layers give")
        return f"{len(list(self._layers()))} layers, {first.inputs} to {last.outputs} channels"

    @torch.compiler.disable
    def _run(self, x: Tensor) -> Tensor | None:
        """``x[B, in, T]`` -> ``[B, out, T']``; None where the original must run."""
        parameters = list(self.parameters())
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
        if wanted or traced() or x.dim() != 3 or 0 in x.shape or any(p.is_inference() for p in parameters):
            return None
        if (backend := self._choose("seanet_stack", x, *parameters)) is None:
            return None

        def build() -> PackedSEANet:
            with torch.inference_mode(False), torch.no_grad():
                return PackedSEANet(self._layers())

        return _packed.get(parameters, build)(x, backend=backend)
