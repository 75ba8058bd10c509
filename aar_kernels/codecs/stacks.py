"""Convolutional encoders and decoders of the SEANet kind, on the packed layers of `aar_kernels.seanet`.

EnCodec's, Mimi's, DAC's and SNAC's, of transformers and of the original packages, differ here in what ``forward`` is
called with, and in how their layers are found.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cache import DerivedCache
from ..precision import without_tf32
from ..seanet import Conv, PackedSEANet
from ..seanet.dac import dac_layers
from ..seanet.encodec import encodec_layers
from .adapter import Adapter, Unsupported, traced

_packed: DerivedCache[PackedSEANet | None] = DerivedCache()


class Stack(Adapter):
    """``_run`` on the layers that ``_layers`` finds in the module."""

    _layers = staticmethod(encodec_layers)

    def _check(self) -> str:
        weight = next(self.parameters())
        if weight.dtype != torch.float32 or weight.device.type not in ("cpu", "cuda"):
            raise Unsupported(f"its weights are {weight.dtype} on {weight.device}; known are float32 on CPU and CUDA")
        packed, count = self._pack()
        return f"{count} layers, {packed.inputs} to {packed.outputs} channels"

    @torch.no_grad()
    @without_tf32()
    def _pack(self) -> tuple[PackedSEANet, int]:
        """The module with the weights that it has now, and its number of layers.

        Both are compared on a probe, since attributes do not tell all that a forward pass does. Raises `Unsupported`.
        """
        try:
            layers = self._layers(self)
            packed = PackedSEANet(layers)
        except ValueError as reason:
            raise Unsupported(str(reason)) from None
        length = 4 * _hop(layers) if packed.inputs < packed.outputs else 8  # some frames for either
        probe = torch.randn(1, packed.inputs, length, generator=torch.Generator().manual_seed(0))
        probe = probe.to(next(self.parameters()).device)
        ours, theirs = packed(probe, backend="reference"), self._aar_original.forward(self, probe)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max()):
            raise Unsupported("on a probe its output is not what its layers give")
        return packed, len(layers)

    @torch.compiler.disable
    def _run(self, x: Tensor) -> Tensor | None:
        """``x[B, in, T]`` -> ``[B, out, T']``; None where the original must run."""
        parameters = list(self.parameters())
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
        if wanted or traced() or x.dim() != 3 or 0 in x.shape or any(p.is_inference() for p in parameters):
            return None
        if (backend := self._choose("seanet_stack", x, *parameters)) is None:
            return None

        def build() -> PackedSEANet | None:
            with torch.inference_mode(False):
                try:
                    return self._pack()[0]
                except Unsupported:  # of a class that was never checked (`patch_mapping`), or no longer so
                    return None

        packed = _packed.get(parameters, build)
        if packed is None or packed.length(x.shape[-1]) < 1:  # too few steps: the original says so in its own way
            return None
        return packed(x, backend=backend)


class TransformersStack(Stack):
    """``EncodecEncoder`` and ``EncodecDecoder``, and ``MimiDecoder``."""

    def forward(self, hidden_states):
        out = self._run(hidden_states)
        return super().forward(hidden_states) if out is None else out


class DacStack(Stack):
    """Of transformers, ``DacEncoder`` and ``DacDecoder``."""

    _layers = staticmethod(dac_layers)

    def forward(self, hidden_state):
        out = self._run(hidden_state)
        return super().forward(hidden_state) if out is None else out


class DescriptStack(Stack):
    """``Encoder`` and ``Decoder`` of ``descript-audio-codec`` and ``snac``."""

    _layers = staticmethod(dac_layers)

    def forward(self, x):
        out = self._run(x)
        return super().forward(x) if out is None else out


def _hop(layers: list) -> int:
    """Steps of input that an encoder's step of output stands for."""
    return math.prod(layer.stride for layer in layers if isinstance(layer, Conv))
