"""Factorised residual quantizers (DAC, SNAC): 1x1 convolutions around a search by cosine in a few channels.

All packages write them alike: ``quantizers``, each with ``in_proj``, ``out_proj`` and ``codebook``. Only the values
that come out differ, and those are put together in the packages' files.

The originals add a straight-through estimator to the code before they project it, which rounds it once; the operators
project the code itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from .. import quantization
from ..cache import DerivedCache
from ..quantization import ProjectedLevels
from .adapter import Adapter, Unsupported, traced

_weights: DerivedCache[tuple[Tensor, ...]] = DerivedCache()


class Encoded(NamedTuple):
    """What an encoding pass knows."""

    levels: ProjectedLevels
    backend: str
    codes: Tensor  # [B, sum(T / strides)]
    latents: Tensor  # [B, levels * dim, T]: what each level projected


class Projected(Adapter):
    """``_encode`` and ``_decode`` on ``self.quantizers``."""

    @classmethod
    def check(cls, module) -> str:
        levels = list(module.quantizers)
        for level in levels:
            for conv in (level.in_proj, level.out_proj):
                if not isinstance(conv, nn.Conv1d) or conv.kernel_size != (1,) or conv.groups != 1 or conv.bias is None:
                    raise Unsupported(f"a projection is not a 1x1 convolution: {conv}")
            if type(level.codebook) is not nn.Embedding or level.codebook.max_norm is not None:
                raise Unsupported(f"a codebook is not a plain embedding: {level.codebook}")
        sizes = sorted({tuple(level.codebook.weight.shape) for level in levels})
        if len(sizes) != 1:
            raise Unsupported(f"its codebooks differ in size: {sizes}")
        (size, dim), channels = sizes[0], levels[0].in_proj.in_channels
        strides = cls._strides(module)
        pooled = f", strides {' '.join(map(str, strides))}" if max(strides) > 1 else ""
        return f"{len(levels)} x {size} codes, cosine in {dim} of {channels} channels{pooled}"

    def _strides(self) -> list[int]:
        return [1] * len(self.quantizers)

    def _prepare(self, strides: Sequence[int], *inputs: Tensor) -> ProjectedLevels | None:
        """The first levels as data; None where a gradient is asked for, or they cannot be remembered."""
        modules = list(self.quantizers)
        convolutions = [conv for level in modules for conv in (level.in_proj, level.out_proj)]
        sources = [level.codebook.weight for level in modules]
        for conv in convolutions:
            sources += _parameters(conv)
        grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *sources))
        if grad or traced() or any(source.is_inference() for source in sources):
            return None

        def build() -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.no_grad():  # made in inference mode, it would have no version
                return (
                    torch.stack([level.codebook.weight for level in modules]),
                    torch.stack([_weight(level.in_proj) for level in modules]),
                    torch.stack([level.in_proj.bias for level in modules]),
                    torch.stack([_weight(level.out_proj) for level in modules]),
                    torch.stack([level.out_proj.bias for level in modules]),
                )

        return ProjectedLevels(*_weights.get(sources, build), strides)

    @torch.compiler.disable
    def _encode(self, z: Tensor, count: int) -> Encoded | None:
        """``z[B, channels, T]`` by the first ``count`` levels; None where the original must run."""
        strides = self._strides()[:count]
        if z.dim() != 3 or 0 in z.shape or count < 1 or any(z.shape[2] % stride for stride in strides):
            return None
        levels = self._prepare(strides, z)
        if levels is None or z.shape[1] != levels.channels:
            return None
        if (backend := self._choose("msrq_encode_projected", levels.codebooks, z)) is None:
            return None
        codes, latents = quantization.encode_projected(z, levels, backend=backend)
        if int(codes.amin()) < 0:  # a NaN or an Inf, for which each package has its own answer
            return None
        return Encoded(levels, backend, codes, latents)

    @torch.compiler.disable
    def _decode(self, codes: Tensor, count: int, length: int) -> tuple[ProjectedLevels, Tensor] | None:
        """Codes ``[B, tokens]`` of the first ``count`` levels -> ``[B, channels, T]`` and the levels; None where the
        original must run."""
        strides = self._strides()[:count]
        if 0 in codes.shape or codes.dtype not in (torch.int64, torch.int32) or len(strides) != count:
            return None
        if any(length % stride for stride in strides) or sum(length // n for n in strides) != codes.shape[1]:
            return None
        levels = self._prepare(strides)
        if levels is None or (backend := self._choose("msrq_decode_projected", levels.codebooks)) is None:
            return None
        low, high = codes.aminmax()
        if low < 0 or high >= levels.codebook_size or codes.device != levels.codebooks.device:
            return None
        return levels, quantization.decode_projected(codes.long(), levels, length=length, backend=backend)


def decoded(encoded: Encoded, length: int) -> Tensor:
    """The sum of the levels' contributions ``[B, channels, T]``."""
    levels, backend, codes, _ = encoded
    return quantization.decode_projected(codes, levels, length=length, backend=backend)


def code_rows(codes: Tensor, levels: ProjectedLevels) -> Tensor:
    """Rows of the codebooks, level below level: codes ``[B, n, T]`` -> ``[B, n * dim, T]``."""
    count, size = codes.shape[1], levels.codebook_size
    offset = torch.arange(0, count * size, size, device=codes.device)[:, None]
    rows = F.embedding(codes + offset, levels.codebooks.flatten(0, 1))
    return rows.permute(0, 1, 3, 2).flatten(1, 2)


def _parameters(conv: nn.Conv1d) -> list[Tensor]:
    """Of the convolution as it is, with weight norm of the old kind, or parametrized."""
    nested = conv._modules.get("parametrizations")
    return [*conv._parameters.values(), *(nested["weight"]._parameters.values() if nested is not None else ())]


def _weight(conv: nn.Conv1d) -> Tensor:
    """``[out, in]``, as the next forward pass would see it: weight norm of the old kind computes it in a hook."""
    for hook in conv._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(conv)[..., 0]
    return conv.weight[..., 0]
